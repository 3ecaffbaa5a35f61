"""Measures training steps at several keeps, for a budget whose target is the time of a step."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from collections.abc import Callable

from rich.console import Console
from transformers import PreTrainedModel

from ...data.splits import Splits
from ...modules import registry
from ...modules.checkpoints.whole_files import write_json
from ...modules.compress import decompress
from ...modules.config import PartConfig
from ...modules.site import TokenSpec
from ...modules.stage import stages_of
from ..build.build import build
from ..build.parts import RunParts
from ..build.step_target import check_step_time, needs_calibration
from ..distributed import collective
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from .arms import batch_of, device_of_steps, name_of_device, step_of
from .bench import paired_ratio, paired_times
from .calibration import Calibration

# Where between one token and all of them the first steps are measured, as shares of the macs_ratio between.
_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The second ones, around the target, as differences of that share.
_AROUND = (-0.08, 0.0, 0.08)
_FIRST_ROUNDS, _ROUNDS = 8, 24


def calibrate(parts: RunParts, target: float, console: Console, seconds: float = 300.0) -> Calibration:
    """Measures dense and compressed steps in pairs, with the task's own loss, backward and optimizer, on a batch of the training data.

    Selectors that leave the count to the budget are replaced by a threshold that keeps the requested share of the batch: their scores are
    not trained yet. The parts keep their weights.

    Args:
        parts: parts of the run, with a budget whose measure is ``macs_ratio``.
        target: requested time of a step ÷ dense.
        console: console for progress.
        seconds: time after which no further round begins, half of it before the target's place is known.

    Raises:
        RecipeError: no keep is as fast as the target.
    """
    budget, device = parts.budget, device_of_steps()
    assert budget is not None
    _, batch = batch_of(parts.data, parts.recipe, device)
    dense, model = decompress(copy.deepcopy(parts.model)).to(device), holding(copy.deepcopy(parts.model)).to(device)
    step, dense_step = (step_of(parts, one, itertools.repeat(batch)) for one in (model, dense))
    points: dict[float, float] = {}
    floor = budget.floor

    def measure(levels: tuple[float, ...], rounds: int) -> float:
        """Adds a point for each level to ``points``; returns the seconds of the dense step."""
        keeps = {level: budget.resolve(floor + (1 - floor) * level) for level in levels}
        steps: dict[str, Callable[[], None]] = {"dense": dense_step}
        steps |= {str(level): lambda keep=keep: step(keep) for level, keep in keeps.items()}  # type: ignore[misc]
        with console.status(f"measuring training steps at {len(levels)} keeps, {rounds} paired rounds"):
            times = paired_times(steps, device, rounds, seconds / 2)
        for level, keep in keeps.items():
            points[budget.cost(keep).macs_ratio] = paired_ratio(times[str(level)], times["dense"]).median
        return statistics.median(times["dense"])

    def found(dense_seconds: float) -> Calibration:
        return Calibration(target, tuple(sorted(points.items())), dense_seconds, _ROUNDS, name_of_device(device))

    first = found(measure(_LEVELS, _FIRST_ROUNDS))
    start = budget.config.start if budget.config.schedule != "constant" else 1.0
    first.check(start)
    place = (first.macs_ratio - floor) / (1 - floor)
    around = tuple(dict.fromkeys(min(1.0, max(0.0, place + difference)) for difference in _AROUND))
    # The first points near the target are the less exact ones.
    near = [macs for macs in points if abs((macs - floor) / (1 - floor) - place) < _AROUND[-1]]
    for macs in near:
        del points[macs]
    result = found(measure(around, _ROUNDS))
    result.check(start)
    return result


def calibration_of(
    recipe: Recipe, run: RunFolder, data: Splits | None, console: Console, resumed: bool
) -> tuple[Calibration | None, Splits | None]:
    """The calibration of a run, the same in every process, and the data that it opened; None for a budget with another measure.

    Rank 0 measures while the others wait, and stores the result in the run folder. A run that goes on has the stored one, so that its keeps
    do not change.

    Raises:
        RecipeError: no keep is as fast as the target, steps cannot be measured (``check_step_time``), or the stored calibration is gone.
    """
    if not needs_calibration(recipe):
        return None, data
    assert recipe.budget is not None
    target = recipe.budget.target
    if resumed:
        return collective.from_rank_zero(lambda: _stored(run)), data
    check_step_time(recipe)
    parts = build(recipe, data)

    def measured() -> Calibration:
        found = calibrate(parts, target, console, recipe.trainer.bench_seconds)
        write_json(run.step_time, found.to_dict())
        return found

    return collective.from_rank_zero(measured), parts.data


def _stored(run: RunFolder) -> Calibration:
    try:
        return Calibration.from_dict(json.loads(run.step_time.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        raise RecipeError(
            f"cannot resume {run.path}: {run.step_time.name}, which says what a step takes on the device, is gone or damaged; restore it, or "
            "start a new run"
        ) from None


def holding(model: PreTrainedModel) -> PreTrainedModel:
    """The model with selectors that keep the requested share of a batch, whatever the scores are; changed in place."""
    for stage in stages_of(model).values():
        if stage.selector.needs_probabilities:
            spec = TokenSpec(0, 0, causal=stage.selector.causal)
            options = {"equal_rows": False, "bucket": stage.selector.bucket}
            stage.selector = registry.build("selector", PartConfig("threshold", options), spec)
    return model
