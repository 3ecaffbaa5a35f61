"""A target in step time as one in MACs, which everything that builds a model works with."""

from __future__ import annotations

from dataclasses import replace

from ..distributed.deepspeed import stage_of
from ..errors import RecipeError
from ..measure.calibration import Calibration, macs_ratio_at
from ..recipe.schema import Recipe

STEP_TIME = "step_time"


def needs_calibration(recipe: Recipe) -> bool:
    """The budget's target is the time of a step."""
    return recipe.budget is not None and recipe.budget.measure == STEP_TIME


def check_step_time(recipe: Recipe) -> None:
    """Raises RecipeError if the budget's target is the time of a step, and steps would be measured otherwise than they train."""
    if not needs_calibration(recipe):
        return
    if stage_of(recipe.trainer) == 3:
        raise RecipeError(
            "budget.measure = 'step_time' measures the whole model in one process, which deepspeed_3 may not fit: set "
            "budget.measure=macs_ratio or trainer.strategy=deepspeed_2"
        )
    if recipe.trainer.compile:
        raise RecipeError(
            "budget.measure = 'step_time' measures steps that are not compiled, and trainer.compile = true trains compiled ones: set "
            "trainer.compile=false or budget.measure=macs_ratio"
        )
    if recipe.distillation is not None:
        raise RecipeError(
            "budget.measure = 'step_time' measures steps without a teacher, and distillation adds the teacher's forward to each: remove "
            "distillation, or set budget.measure=macs_ratio"
        )


def with_macs(recipe: Recipe, calibration: Calibration | None = None) -> Recipe:
    """The recipe with a budget in ``macs_ratio`` in place of one in step time; other recipes stay as they are.

    Args:
        recipe: the recipe.
        calibration: what steps take on the device. None takes the time for the ``macs_ratio``, for what is no training: checks, costs.
    """
    budget = recipe.budget
    if budget is None or budget.measure != STEP_TIME:
        return recipe

    def macs(target: float) -> float:
        # At full length no stage has an effect, whatever its router costs.
        return target if calibration is None or target == 1 else macs_ratio_at(target, calibration.points)

    moved = replace(budget, measure="macs_ratio", target=macs(budget.target), start=macs(budget.start))
    return recipe.model_copy(update={"budget": moved})
