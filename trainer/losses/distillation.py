"""Knowledge distillation: a frozen dense classifier tells the student what it answers, and what its tokens look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from ...modules.tokens.trace import Trace
from ..build.initial_weights import start_of
from ..recipe.schema import DistillationRecipe
from ..run_folder import located

SELF = "dense_self"


@dataclass(frozen=True)
class DistillationLoss:
    """What distillation makes of a step.

    Attributes:
        total: with gradient: the labels' loss and the teacher's, weighted.
        answers: Kullback-Leibler divergence of the answers times the squared temperature, detached.
        hidden: of the tokens, detached; None where they are not matched.
    """

    total: Tensor
    answers: Tensor
    hidden: Tensor | None


class Distillation:
    """A frozen teacher and what is learned from it (arXiv 1503.02531; tokens as in DynamicViT, arXiv 2106.02034).

    No ``nn.Module``: whoever holds it has the teacher neither among its parameters nor in its checkpoints.

    Args:
        teacher: a dense classifier.
        recipe: weights and temperature.
    """

    def __init__(self, teacher: PreTrainedModel, recipe: DistillationRecipe) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.recipe = recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        # Averaging weights copies the whole task; one teacher serves them all.
        return self

    @property
    def student_options(self) -> dict[str, Any]:
        """What the student's forward needs to be called with."""
        return {"output_hidden_states": True} if self.recipe.hidden else {}

    def __call__(self, task_loss: Tensor, out: Any, pixel_values: Tensor, trace: Trace | None) -> DistillationLoss:
        """The loss of one step.

        Args:
            task_loss: of the labels.
            out: of the student: ``logits``, and ``hidden_states`` where tokens are matched.
            pixel_values: that the student saw, mixed or not.
            trace: of the student's forward; None for a dense student. The teacher is dense and has none.
        """
        recipe = self.recipe
        if self.teacher.device != pixel_values.device:
            self.teacher.to(pixel_values.device)
        with torch.no_grad():
            taught = self.teacher(pixel_values=pixel_values, **self.student_options)
        answers = distillation_loss(out.logits, taught.logits, recipe.temperature)
        total = (1 - recipe.weight) * task_loss + recipe.weight * answers
        hidden = None
        if recipe.hidden:
            hidden = hidden_loss(_last(out, "student"), _last(taught, "teacher"), trace)
            total = total + recipe.hidden * hidden
        return DistillationLoss(total, answers.detach(), None if hidden is None else hidden.detach())


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of softened answers (B, classes), mean over rows, times temperature² so that gradients keep their size."""
    student = functional.log_softmax(logits.float() / temperature, -1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, -1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hidden_loss(hidden_states: Tensor, teacher_hidden_states: Tensor, trace: Trace | None) -> Tensor:
    """Mean squared difference of layer-normalised tokens: those that are left against the teacher's at their positions.

    Args:
        hidden_states: (B, K, C) of the student; tokens that stand for several have no counterpart and are left out.
        teacher_hidden_states: (B, N, C).
        trace: of the student's forward; None where it dropped nothing.
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
    """The teacher's config; weights are not read.

    Args:
        recipe: the block.
        model: the recipe's ``model`` block, for ``dense_self``.
        student: config of the student.
        classes: names of the data's labels, in order.

    Raises:
        ValueError: there is no such teacher, or it does not fit the student or the data.
    """
    name, revision = _source(recipe, model)
    given = f"distillation.teacher = {recipe.teacher!r}"
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{given} cannot be loaded: {str(error).splitlines()[0]}") from None
    if getattr(config, "compression", None) is not None:
        raise ValueError(f"{given} is compressed: the teacher must be dense; give the run of a recipe without compression")
    if not any(str(item).endswith("ForImageClassification") for item in config.architectures or []):
        raise ValueError(f"{given} is no image classifier (its architecture is {config.architectures}): train one on these data first")
    _check_labels(given, config, classes)
    if recipe.hidden:
        for key in ("hidden_size", "patch_size", "image_size", "model_type"):
            ours, theirs = getattr(student, key, None), getattr(config, key, None)
            if ours != theirs:
                raise ValueError(
                    f"distillation.hidden = {recipe.hidden} compares tokens one by one, and {key} of the teacher is {theirs}, "
                    f"of the student {ours}: set distillation.hidden=0 or take a teacher of the student's shape"
                )
    return config


def load_teacher(recipe: DistillationRecipe, model: Any, student: PretrainedConfig, classes: list[str]) -> Distillation:
    """The teacher with its weights. Raises ValueError where it does not fit, as ``check_teacher`` does."""
    config = check_teacher(recipe, model, student, classes)
    name, revision = _source(recipe, model)
    teacher, report = AutoModelForImageClassification.from_pretrained(
        name, revision=revision, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ValueError(f"distillation.teacher = {recipe.teacher!r} lacks the weights {', '.join(missing[:3])}: it would teach noise")
    return Distillation(teacher, recipe)


def _source(recipe: DistillationRecipe, model: Any) -> tuple[str, str | None]:
    """Folder or hub name of the teacher, and its revision."""
    if recipe.teacher == SELF:
        if model.name is None:
            raise ValueError(
                "distillation.teacher = 'dense_self' is model.name without stages, and model.config starts from random weights: "
                "train the dense recipe first and give its run folder"
            )
        start = start_of(model)
        if start is None or start.weights is None:
            raise ValueError(
                f"distillation.teacher = 'dense_self': {model.name!r} is a checkpoint without dense weights of its own; name a run"
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
            f"{given} knows {len(names)} labels, the data have {len(classes)}: give a teacher that was trained on the same labels"
        )
    unnamed = all(str(name) == f"LABEL_{code}" for code, name in names.items())
    for code, name in enumerate(classes):
        if not unnamed and str(names[code]) != name:
            raise ValueError(
                f"{given}: its label {code} is {names[code]!r}, that of the data is {name!r}; teacher and student must have one order of labels"
            )


def _last(out: Any, who: str) -> Tensor:
    states = out.hidden_states
    if not states:
        raise RuntimeError(f"distillation.hidden needs hidden states, and the {who}'s forward gave none; set distillation.hidden=0")
    last: Tensor = states[-1]
    return last
