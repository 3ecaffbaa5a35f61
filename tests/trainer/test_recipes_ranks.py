"""Every shipped recipe that is no control arm on two processes, under every strategy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.trainer.test_strategies import scalars
from tests.trainer.two_ranks_recipes import CASES, FAMILY, OF_FAMILY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_a_recipe_learns_the_same_under_every_strategy(name: str, strategy: str, two_processes: Path) -> None:
    losses, expected = (scalars(two_processes / "recipes" / name / run) for run in (strategy, "plain"))
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("strategy", OF_FAMILY)
def test_processes_with_images_and_without_learn_together(strategy: str, two_processes: Path) -> None:
    # Before its steps, a process without DeepSpeed runs a row to find parameters without gradient.
    first, second = (seen[-3:] for seen in json.loads((two_processes / "recipes" / "results.json").read_text())[strategy])
    assert len(first) == len(second) == 3
    assert any(one != other for one, other in zip(first, second, strict=True))
    losses, expected = (scalars(two_processes / "recipes" / FAMILY / run) for run in (strategy, "plain"))
    assert len(losses) == 3
    assert losses == pytest.approx(expected, abs=1e-3)
