"""Which stages can have another keep in each training step, in the teacher that is the model itself, or in evaluation."""

from __future__ import annotations

from collections.abc import Iterable

from ...modules.budget.drawn_keep import DrawnKeep
from ...modules.rules.keeps import check_halves, check_movable
from ...modules.stage import Stage
from ..losses.teachers import SelfTeacher
from ..recipe.schema import ITSELF, DistillationRecipe, Recipe


def check_keeps(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Raises ValueError if a stage cannot follow the keeps that ``training_keep``, ``phases``, ``distillation`` and a moving budget request,
    or if the teacher ``self`` has the student's keeps in every step.

    Args:
        recipe: the recipe.
        stages: its built stages.
    """
    stages, drawn, teacher, budget = list(stages), recipe.training_keep, recipe.distillation, recipe.budget
    itself = teacher is not None and teacher.teacher == ITSELF
    if drawn is not None:
        check_movable(stages, "training_keep", drawn.least)
    _check_phases(recipe, stages)
    if teacher is not None and itself and teacher.milder is not None:
        # The teacher's keeps are above the stages' own.
        check_movable(stages, "distillation.milder", 1.0)
        for stage in stages:
            if stage.config.tokens is not None and drawn is None:
                raise ValueError(
                    f"stage {stage.config.key!r}: distillation.milder is a difference of keeps, and the stage has tokens: give it keep"
                )
    elif teacher is not None and itself and teacher.keep < 1:
        check_movable(stages, "distillation.keep", teacher.keep)
    if teacher is not None and itself:
        _check_taught(recipe, teacher, stages)
    if budget is not None and budget.measure == "keep" and budget.schedule != "constant":
        assert recipe.compression is not None
        free = {stage.key for stage in recipe.compression.stages if stage.free}
        check_halves((stage for stage in stages if stage.config.key in free), "budget.start", budget.start)


def _check_taught(recipe: Recipe, teacher: DistillationRecipe, stages: Iterable[Stage]) -> None:
    """Raises ValueError if teacher and student have the same keeps in every step."""
    drawn, budget = recipe.training_keep, recipe.budget
    only = None if drawn is None else _only(drawn)
    moves = (drawn is not None and only is None) or (budget is not None and budget.schedule != "constant")
    if teacher.milder is not None or recipe.phases or moves:
        return
    own = {stage.config.key: stage.config.keep for stage in stages}
    requested = {} if only is None else {stage.config.key: only for stage in stages if not stage.config.left_out}
    if SelfTeacher(teacher, own, 1).keeps(requested, 0) is None:
        raise ValueError(
            f"distillation.keep = {teacher.keep:g} keeps as many tokens as the student does in every step, so that no step has a teacher: "
            f"{'raise' if teacher.keep < 1 else 'lower'} distillation.keep, or remove distillation"
        )


def _only(drawn: DrawnKeep) -> float | None:
    """The keep that every step draws; None if steps can differ."""
    if drawn.full == 1 and not drawn.also:
        return 1.0
    keeps = set(drawn.choices or (drawn.highest, drawn.lowest, drawn.start)) - {None} | set(drawn.also) | ({1.0} if drawn.full else set())
    return keeps.pop() if len(keeps) == 1 else None


def _check_phases(recipe: Recipe, stages: Iterable[Stage]) -> None:
    keeps = {f"phases.{number}.keep": phase.keep for number, phase in enumerate(recipe.phases or ()) if phase.keep is not None}
    if not keeps or recipe.compression is None:
        return
    free = {stage.key for stage in recipe.compression.stages if stage.free}
    phased = [stage for stage in stages if stage.config.key in free]
    for key, keep in keeps.items():
        check_movable(phased, key, keep)
    for stage in phased:
        if not stage.idle_at(1.0):
            raise ValueError(
                f"stage {stage.config.key!r} has an effect on tokens that are kept, so that it does nothing in no phase, and phases leave an "
                "ordinary model: take scorer 'random' without an estimator, or give the stage a keep of its own"
            )
