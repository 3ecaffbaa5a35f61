"""Every shipped recipe that is no control arm on two processes, under every strategy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.trainer.test_strategies import scalars
from tests.trainer.two_ranks_recipes import NAMES, STRATEGIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_learns_the_same_under_every_strategy(name: str, strategy: str, two_processes: Path) -> None:
    losses, expected = (scalars(two_processes / "recipes" / name / run) for run in (strategy, "plain"))
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(expected, abs=1e-3)
