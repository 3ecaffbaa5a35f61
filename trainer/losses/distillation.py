"""Knowledge distillation: the student learns from the answers and the tokens of a frozen dense classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from ...modules.checkpoints.base_weights import check_weights
from ...modules.checkpoints.foreign_config import load_config
from ...modules.tokens.trace import Trace
from ..build.initial_weights import start_of
from ..recipe.schema import DistillationRecipe
from ..run_folder import located

SELF = "dense_self"


@dataclass(frozen=True)
class DistillationLoss:
    """Losses of one step of distillation.

    Attributes:
        total: weighted sum of the labels' and the teacher's loss, with gradient.
        answers: Kullback-Leibler divergence of the answers × squared temperature, detached.
        hidden: loss of the matched tokens, detached; None if tokens are not matched.
    """

    total: Tensor
    answers: Tensor
    hidden: Tensor | None


def learn_from_itself(recipe: DistillationRecipe, task_loss: Tensor, logits: Tensor, teacher_logits: Tensor) -> DistillationLoss:
    """The loss of a step in which the model with more tokens teaches the model with fewer (as in EPIC, NeurIPS 2025).

    Args:
        recipe: weight and temperature.
        task_loss: loss of the labels.
        logits: (P, classes) of the P predicted tokens.
        teacher_logits: (P, classes) of the same tokens, without gradient.
    """
    answers = distillation_loss(logits, teacher_logits, recipe.temperature)
    return DistillationLoss((1 - recipe.weight) * task_loss + recipe.weight * answers, answers.detach(), None)


class Distillation:
    """A frozen teacher and its losses (arXiv 1503.02531; tokens as in DynamicViT, arXiv 2106.02034).

    Not an ``nn.Module``, so that the teacher is not among the parameters or in the checkpoints of the module that holds it.

    Args:
        teacher: a dense classifier.
        recipe: weights and temperature.
    """

    def __init__(self, teacher: PreTrainedModel, recipe: DistillationRecipe) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.recipe = recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        # Averaging the weights copies the whole task; the copies share one teacher.
        return self

    @property
    def student_options(self) -> dict[str, Any]:
        """Extra arguments of the student's forward."""
        return {"output_hidden_states": True} if self.recipe.hidden else {}

    def __call__(self, task_loss: Tensor, out: Any, pixel_values: Tensor, trace: Trace | None) -> DistillationLoss:
        """The loss of one step.

        Args:
            task_loss: loss of the labels.
            out: output of the student: ``logits``, and ``hidden_states`` if tokens are matched.
            pixel_values: the student's input, after mixing.
            trace: trace of the student's forward; None for a dense student. The teacher is dense and has none.
        """
        recipe = self.recipe
        if self.teacher.device != pixel_values.device:
            self.teacher.to(pixel_values.device)
        with torch.no_grad():
            teacher_out = self.teacher(pixel_values=pixel_values, **self.student_options)
        answers = distillation_loss(out.logits, teacher_out.logits, recipe.temperature)
        total = (1 - recipe.weight) * task_loss + recipe.weight * answers
        hidden = None
        if recipe.hidden:
            hidden = hidden_loss(_last(out, "student"), _last(teacher_out, "teacher"), trace)
            total = total + recipe.hidden * hidden
        return DistillationLoss(total, answers.detach(), None if hidden is None else hidden.detach())


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of softened answers (B, classes), mean over rows, × temperature² so that gradients keep their scale."""
    student = functional.log_softmax(logits.float() / temperature, -1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, -1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hidden_loss(hidden_states: Tensor, teacher_hidden_states: Tensor, trace: Trace | None) -> Tensor:
    """Mean squared difference of layer-normalised tokens: the student's remaining tokens against the teacher's at the same positions.

    Args:
        hidden_states: (B, K, C) of the student; merged tokens are left out, because the teacher has no such tokens.
        teacher_hidden_states: (B, N, C) of the teacher.
        trace: trace of the student's forward; None if it dropped nothing.
    """
    width = hidden_states.shape[-1:]
    state = None if trace is None else trace.state
    if state is not None:
        index = state.position.unsqueeze(-1).expand(-1, -1, teacher_hidden_states.shape[-1])
        teacher_hidden_states = teacher_hidden_states.gather(1, index)
    student = functional.layer_norm(hidden_states.float(), width)
    difference = (student - functional.layer_norm(teacher_hidden_states.float(), width)).square().mean(-1)
    if state is None:
        return difference.mean()
    single = state.size == 1
    return (difference * single).sum() / single.sum().clamp(min=1)


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
    # What the outputs are belongs to the task, whatever the checkpoint was saved with.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
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


def load_teacher(recipe: DistillationRecipe, model: Any, student: PretrainedConfig, classes: list[str]) -> Distillation:
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
    return Distillation(teacher, recipe)


def _source(recipe: DistillationRecipe, model: Any) -> tuple[str, str | None]:
    """Folder or hub name of the teacher, and its revision."""
    if recipe.teacher == SELF:
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


def _last(out: Any, role: str) -> Tensor:
    states = out.hidden_states
    if not states:
        raise RuntimeError(f"distillation.hidden needs hidden states, and the {role}'s forward returned none; set distillation.hidden=0")
    last: Tensor = states[-1]
    return last
