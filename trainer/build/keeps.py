"""Which stages can have another keep in each training step, or in the teacher that is the model itself."""

from __future__ import annotations

from collections.abc import Iterable

from ...modules.stage import Stage
from ..recipe.schema import ITSELF, Recipe


def check_keeps(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Raises ValueError if a stage cannot follow the keeps that ``training_keep`` and ``distillation`` request.

    Args:
        recipe: the recipe.
        stages: its built stages.
    """
    teacher = recipe.distillation if recipe.distillation is not None and recipe.distillation.teacher == ITSELF else None
    moves = "training_keep" if recipe.training_keep is not None else None
    if teacher is not None and moves is None and (teacher.milder is not None or teacher.keep < 1):
        moves = f"distillation.{'keep' if teacher.milder is None else 'milder'}"
    if moves is None:
        return
    for stage in stages:
        where, selector, merger = f"stage {stage.config.key!r}", *(stage.config.part(kind).name for kind in ("selector", "merger"))
        if stage.selector.cuts or stage.selector.adaptive:
            raise ValueError(
                f"{where}: selector {selector!r} has a threshold of one keep, and {moves} requests others: take top_k or predictor"
            )
        if stage.merger.outputs is not None:
            raise ValueError(f"{where}: merger {merger!r} makes one number of tokens, and {moves} requests others: take another merger")
        if moves == "distillation.milder" and stage.config.tokens is not None:
            raise ValueError(f"{where}: distillation.milder is a difference of keeps, and the stage has tokens: give it keep")
