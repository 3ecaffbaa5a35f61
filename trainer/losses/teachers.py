"""Teachers: a frozen dense classifier, or the trained model itself with more of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from ...modules.budget.schedules import linear, progress
from ...modules.checkpoints.base_weights import check_weights
from ...modules.checkpoints.foreign_config import load_config
from ...modules.stage import Stage, stages_of
from ...modules.tokens.trace import Trace
from ..build.initial_weights import start_of
from ..build.model_settings import set_outputs
from ..build.parts import RunParts
from ..recipe.schema import ITSELF, DistillationRecipe
from ..run_folder import located
from .distillation import Taught

DENSE_SELF = "dense_self"


class GivenTeacher:
    """A frozen dense classifier (arXiv 1503.02531).

    Not an ``nn.Module``, so that it is not among the parameters or in the checkpoints of the module that holds it.

    Args:
        model: the classifier.
        recipe: the ``distillation`` block.
    """

    def __init__(self, model: PreTrainedModel, recipe: DistillationRecipe) -> None:
        self.model = model.eval().requires_grad_(False)
        self.recipe = recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenTeacher:
        # Averaging the weights copies the whole task; the copies share one teacher.
        return self

    def __call__(self, task: Any, student: PreTrainedModel, batch: Mapping[str, Any], trace: Trace | None) -> Taught | None:
        """What the teacher says about a batch; None in a step without a teacher.

        Args:
            task: task whose ``teach`` calls a model.
            student: the trained model.
            batch: the student's batch, after mixing.
            trace: trace of the student's forward, before it runs; None for a dense student.
        """
        if self.model.device != student.device:
            self.model.to(student.device)
        with torch.no_grad():
            taught: Taught = task.teach(self.model, batch, self.recipe)
        return taught


class SelfTeacher:
    """The trained model itself, with other keeps (EPIC, NeurIPS 2025, with more tokens; DualSpeed, arXiv 2602.03815, with fewer).

    Args:
        recipe: the ``distillation`` block.
        own: keep of each stage by name; None for a stage with a number of tokens.
        total_steps: optimizer steps of the run.
    """

    def __init__(self, recipe: DistillationRecipe, own: Mapping[str, float | None], total_steps: int) -> None:
        self.recipe, self.own, self.total_steps = recipe, dict(own), total_steps

    def keeps(self, requested: Mapping[str, float], step: int) -> dict[str, float] | None:
        """Keep of each stage in the teacher at a step; None if it has the student's, from whom there is nothing to learn.

        Args:
            requested: keeps of the student that replace the stages' own.
            step: optimizer step.
        """
        student = {name: requested.get(name, keep) for name, keep in self.own.items()}
        milder, dense = self.recipe.milder, self.recipe.milder is None and self.recipe.keep == 1
        gap = 0.0 if milder is None else linear(milder.start, milder.end, progress(step, 1.0, self.total_steps))
        teacher = {
            # Layers that are left out are so in every teacher but the dense one.
            name: 0.0 if keep == 0 and not dense else self.recipe.keep if milder is None or keep is None else min(1.0, keep + gap)
            for name, keep in student.items()
        }
        return None if teacher == student else teacher

    def __call__(self, task: Any, student: PreTrainedModel, batch: Mapping[str, Any], trace: Trace | None) -> Taught | None:
        """What the model says with the teacher's keeps; None in a step in which these are the student's, or in which a threshold that they
        need has seen no score: the student's training forward sets it. Arguments as of GivenTeacher.
        """
        assert trace is not None
        assert isinstance(trace.step, int)
        keep = self.keeps(trace.keep, trace.step)
        if keep is None or any(_unset(stage, keep[name]) for name, stage in stages_of(student).items()):
            return None
        other = Trace(step=trace.step, seed=trace.seed, sample_ids=trace.sample_ids, keep=keep, lookahead=True)
        # In evaluation mode thresholds do not follow the teacher's scores.
        student.eval()
        with torch.no_grad():
            taught: Taught = task.teach(student, batch, self.recipe, trace=other)
        student.train()
        return taught


def _unset(stage: Stage, keep: float) -> bool:
    """True if a causal stage cannot decide at this keep, because its threshold has seen no score yet."""
    return keep not in (0, 1) and stage.adapter.causal and stage.selector.uncalibrated


def teacher_of(parts: RunParts) -> GivenTeacher | SelfTeacher | None:
    """The teacher of a run; None if its recipe has none. Raises ValueError if it does not fit."""
    recipe = parts.recipe.distillation
    if recipe is None:
        return None
    if recipe.teacher != ITSELF:
        return load_teacher(recipe, parts.recipe.model, parts.model.config, parts.data.classes)
    return SelfTeacher(recipe, {name: stage.config.keep for name, stage in stages_of(parts.model).items()}, parts.total_steps)


def check_teacher(recipe: DistillationRecipe, model: Any, student: PretrainedConfig, classes: list[str]) -> PretrainedConfig:
    """The teacher's config, without reading weights.

    Args:
        recipe: the ``distillation`` block.
        model: the ``model`` block, for ``dense_self``.
        student: config of the student.
        classes: names of the data's classes, in order.

    Raises:
        ValueError: the teacher does not exist, or does not fit the student or the data.
    """
    name, revision = _source(recipe, model)
    given = f"distillation.teacher = {recipe.teacher!r}"
    try:
        config = load_config(name, revision)
    except ValueError as error:
        raise ValueError(f"{given} cannot be loaded: {str(error).splitlines()[0]}") from None
    if getattr(config, "compression", None) is not None:
        raise ValueError(f"{given} is compressed, and a teacher must be dense: use the run of a recipe without compression")
    if not any(str(item).endswith("ForImageClassification") for item in config.architectures or []):
        raise ValueError(f"{given} is not an image classifier (its architecture is {config.architectures}): train one on these data first")
    set_outputs(config)
    _check_labels(given, config, classes)
    if recipe.hidden:
        for key in ("hidden_size", "patch_size", "image_size", "model_type"):
            in_student, in_teacher = getattr(student, key, None), getattr(config, key, None)
            if in_student != in_teacher:
                raise ValueError(
                    f"distillation.hidden = {recipe.hidden} compares single tokens, and {key} of the teacher is {in_teacher}, "
                    f"of the student {in_student}: set distillation.hidden=0 or use a teacher of the student's shape"
                )
    return config


def load_teacher(recipe: DistillationRecipe, model: Any, student: PretrainedConfig, classes: list[str]) -> GivenTeacher:
    """The teacher with its weights. Raises ValueError if it does not fit, as ``check_teacher`` does."""
    config = check_teacher(recipe, model, student, classes)
    name, revision = _source(recipe, model)
    check_weights(name, revision)
    teacher, report = AutoModelForImageClassification.from_pretrained(
        name, revision=revision, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ValueError(f"distillation.teacher = {recipe.teacher!r} lacks the weights {', '.join(missing[:3])}: they would be random")
    return GivenTeacher(teacher, recipe)


def _source(recipe: DistillationRecipe, model: Any) -> tuple[str, str | None]:
    """Folder or hub name of the teacher, and its revision."""
    if recipe.teacher == DENSE_SELF:
        if model.name is None:
            raise ValueError(
                "distillation.teacher = 'dense_self' is model.name without stages, and model.config starts from random weights: "
                "train the dense recipe first and set distillation.teacher to its run folder"
            )
        start = start_of(model)
        if start is None or start.weights is None:
            raise ValueError(
                f"distillation.teacher = 'dense_self': {model.name!r} is a checkpoint without its own dense weights; name a run"
            )
        return start.weights, start.revision
    try:
        return located(recipe.teacher, whole=True), recipe.revision
    except FileNotFoundError as error:
        raise ValueError(f"distillation.teacher = {recipe.teacher!r} cannot be loaded: {error}") from None


def _check_labels(given: str, config: PretrainedConfig, classes: list[str]) -> None:
    names: Mapping[int, str] = config.id2label or {}
    if len(names) != len(classes):
        raise ValueError(
            f"{given} has {len(names)} labels, the data have {len(classes)}: use a teacher that was trained on the same labels"
        )
    unnamed = all(str(name) == f"LABEL_{code}" for code, name in names.items())
    for code, name in enumerate(classes):
        if not unnamed and str(names[code]) != name:
            raise ValueError(
                f"{given}: its label {code} is {names[code]!r}, that of the data is {name!r}; teacher and student need the same label order"
            )
