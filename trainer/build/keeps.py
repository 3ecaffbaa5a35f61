"""Which stages can have another keep in each training step, in the teacher that is the model itself, or in evaluation."""

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
    stages, teacher = list(stages), recipe.distillation
    if recipe.training_keep is not None:
        check_movable(stages, "training_keep")
    elif teacher is not None and teacher.teacher == ITSELF and teacher.milder is not None:
        check_movable(stages, "distillation.milder")
        for stage in stages:
            if stage.config.tokens is not None:
                raise ValueError(
                    f"stage {stage.config.key!r}: distillation.milder is a difference of keeps, and the stage has tokens: give it keep"
                )
    elif teacher is not None and teacher.teacher == ITSELF and teacher.keep < 1:
        check_movable(stages, "distillation.keep")


def check_movable(stages: Iterable[Stage], key: str) -> None:
    """Raises ValueError if a stage cannot follow a keep other than its own.

    Args:
        stages: built stages.
        key: what requests the keep, for the message.
    """
    for stage in stages:
        where, selector, merger = f"stage {stage.config.key!r}", *(stage.config.part(kind).name for kind in ("selector", "merger"))
        if stage.selector.one_keep:
            raise ValueError(f"{where}: selector {selector!r} has a threshold of one keep, and {key} requests others: take top_k")
        if stage.merger.outputs is not None:
            raise ValueError(f"{where}: merger {merger!r} makes one number of tokens, and {key} requests others: take another merger")
