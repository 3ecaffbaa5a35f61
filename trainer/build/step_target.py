"""A target in step time as one in MACs, which everything that builds a model works with."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from ...modules.budget.budget import Budget
from ...modules.budget.config import BudgetConfig
from ...modules.config import CompressionConfig
from ..distributed.deepspeed import stage_of
from ..errors import RecipeError
from ..measure.calibration import Calibration, macs_ratio_at
from ..recipe.schema import Recipe
from ..tasks.base import task_named

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


def budget_of(recipe: Recipe, model: PreTrainedModel, compression: CompressionConfig, steps: int, assumed: bool) -> Budget:
    """The budget of a recipe ``with_macs``.

    Args:
        recipe: the recipe, whose budget is in ``macs_ratio`` or another measure of tokens.
        model: the dense model.
        compression: the stages.
        steps: optimizer steps.
        assumed: a time that is not calibrated yet stands for the ``macs_ratio``. It is moved to what the stages reach, since steps may take
            more or less than their MACs: only the calibration knows which times are out of reach.

    Raises:
        ValueError: the target cannot be met.
    """
    config, size = recipe.budget, task_named(recipe.task).size(recipe)
    assert config is not None
    if assumed:
        reach = Budget(BudgetConfig(measure="macs_ratio", target=1.0, shares=config.shares), model, compression, size=size)
        most = reach.cost(reach.resolve(1.0)).macs_ratio

        def within(target: float) -> float:
            return target if target == 1 else min(max(target, reach.floor), most)

        config = replace(config, target=within(config.target), start=within(config.start))
    return Budget(config, model, compression, steps, recipe.seed, size)
