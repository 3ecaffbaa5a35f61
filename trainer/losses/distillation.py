"""Knowledge distillation: the student learns from the answers and the tokens of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from ...modules.tokens.trace import Trace
from ..recipe.schema import DistillationRecipe


@dataclass(frozen=True)
class Taught:
    """What a teacher says about a batch, without gradient.

    Attributes:
        answers: (P, classes) logits at the P places with a label; of a causal language model (B · N, C), what its head reads, since the
            logits are computed in parts.
        tokens: tokens behind the last layer, (B, N, C), or (P, C) of a language model; None unless they are matched.
    """

    answers: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class DistillationLoss:
    """Losses of one step of distillation.

    Attributes:
        total: weighted sum of the labels' and the teacher's loss, with gradient.
        labels: loss of the labels, unweighted.
        answers: Kullback-Leibler divergence of the answers × squared temperature, detached.
        hidden: loss of the matched tokens, detached; None if tokens are not matched.
    """

    total: Tensor
    labels: Tensor
    answers: Tensor
    hidden: Tensor | None


def weighted(recipe: DistillationRecipe, labels: Tensor, answers: Tensor, hidden: Tensor | None = None) -> DistillationLoss:
    """The loss of a step from its parts.

    Args:
        recipe: weights.
        labels: scalar loss of the labels.
        answers: scalar divergence from the teacher's answers.
        hidden: scalar loss of the matched tokens; None if tokens are not matched.
    """
    total = recipe.label_weight * labels + recipe.weight * answers
    if hidden is None:
        return DistillationLoss(total, labels, answers.detach(), None)
    return DistillationLoss(total + recipe.hidden * hidden, labels, answers.detach(), hidden.detach())


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float, reverse: bool = False) -> Tensor:
    """(P,) float32: KL(teacher ‖ student) of softened answers (P, classes) × temperature², so that gradients keep their scale
    (arXiv 1503.02531).

    Args:
        logits: (P, classes) of the student.
        teacher_logits: (P, classes) of the teacher.
        temperature: softens both answers.
        reverse: KL(student ‖ teacher) instead.
    """
    student = functional.log_softmax(logits.float() / temperature, -1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, -1)
    given, expected = (teacher, student) if reverse else (student, teacher)
    return functional.kl_div(given, expected, reduction="none", log_target=True).sum(-1) * temperature**2


def distillation_loss(logits: Tensor, teacher_logits: Tensor, recipe: DistillationRecipe) -> Tensor:
    """Mean ``divergence`` over the places; 0 without any."""
    return mean(divergence(logits, teacher_logits, recipe.temperature, recipe.reverse))


def mean(values: Tensor) -> Tensor:
    """Mean of (P,) values; 0 without any."""
    return values.sum() / max(1, len(values))


def hidden_loss(hidden_states: Tensor, teacher_hidden_states: Tensor, trace: Trace | None) -> Tensor:
    """Mean squared difference of layer-normalised tokens: the student's remaining tokens against the teacher's at the same positions
    (DynamicViT, arXiv 2106.02034).

    Args:
        hidden_states: (B, K, C) of the student; merged tokens are left out, because the teacher has no such tokens.
        teacher_hidden_states: (B, N, C) of the teacher.
        trace: trace of the student's forward; None if it dropped nothing.

    Raises:
        ValueError: a restore behind the last layer changed which tokens there are.
    """
    state = None if trace is None else trace.state
    if state is not None:
        if state.tokens != hidden_states.shape[1]:
            raise ValueError(
                f"distillation.hidden compares the last layer's {hidden_states.shape[1]} tokens, and compression.restore behind it gives "
                f"{state.tokens}: restore before the last layer, or set distillation.hidden=0"
            )
        index = state.position.unsqueeze(-1).expand(-1, -1, teacher_hidden_states.shape[-1])
        teacher_hidden_states = teacher_hidden_states.gather(1, index)
    difference = token_difference(hidden_states, teacher_hidden_states)
    if state is None:
        return difference.mean()
    single = state.size == 1 if state.valid is None else (state.size == 1) & state.valid
    return (difference * single).sum() / single.sum().clamp(min=1)


def token_difference(hidden_states: Tensor, teacher_hidden_states: Tensor) -> Tensor:
    """(…,) float32 mean squared difference of layer-normalised tokens (…, C)."""
    width = hidden_states.shape[-1:]
    student = functional.layer_norm(hidden_states.float(), width)
    return (student - functional.layer_norm(teacher_hidden_states.float(), width)).square().mean(-1)


def last_tokens(out: Any) -> Tensor:
    """The tokens behind the last layer, of the output of a model with a classifier."""
    states = out.hidden_states
    if not states:
        raise RuntimeError("distillation.hidden needs hidden states, and a forward returned none; set distillation.hidden=0")
    last: Tensor = states[-1]
    return last


def hidden_options(recipe: DistillationRecipe) -> dict[str, Any]:
    """Arguments of a classifier's forward, for its hidden states if they are matched."""
    return {"output_hidden_states": True} if recipe.hidden else {}
