"""Runs whose routers are fitted before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from laconic.modules.stage import stages_of
from laconic.trainer.build.build import build
from laconic.trainer.build.routers import started
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.files import load
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import small


@pytest.mark.slow
def test_a_run_fits_its_scorers_and_sets_its_thresholds_before_the_first_step(tmp_path: Path) -> None:
    stages = "compression.stages=[{layer: [2, 3], site: around, scorer: update, selector: threshold, estimator: gate}]"
    given = [*small("llm_pretrain", tmp_path, QUICK), stages]
    parts = build(load("llm_pretrain", given).recipe)
    ranks = started(parts).scorers
    assert ranks.keys() == {"around_2", "around_3"}
    assert all(stage.scorer.fitted and not stage.selector.uncalibrated for stage in stages_of(parts.model).values())
    assert not started(parts)
    without = build(load("llm_pretrain", [*given, "trainer.start_rows=0"]).recipe, parts.data)
    with pytest.raises(RecipeError, match="fitted before the first step, and trainer.start_rows = 0"):
        started(without)
