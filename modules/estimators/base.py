"""Estimator: the base class of all estimators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision


@dataclass(frozen=True)
class Estimate:
    """Gradient paths to the scorer. Most do not change the forward's values; an estimator that runs in evaluation may, and one that
    ``weighs_training`` does in training alone.

    Attributes:
        scale: (B, M) factor on the kept tokens, mostly of value 1; at a bypass site, on the layer's update. None for no factor.
        key_bias: (B, M) bias with value 0 on the attention logits of each key in all later layers; None for no bias.
        bypassed: (B, M) factor on the tokens that bypass the layer; None for no factor.
        confidence: (B, M) factor with value 1 on the update that each token gets in a restore by ``dechunk``; None for no factor.
        loss: scalar to add to the task's loss, already weighted; None without one.
    """

    scale: Tensor | None = None
    key_bias: Tensor | None = None
    bypassed: Tensor | None = None
    confidence: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """The result of a router at one site.

    Attributes:
        scored: output of the scorer.
        decision: output of the selector, or the replayed decision.
        estimate: output of the estimator, including the selector's auxiliary loss.
        keep: requested keep.
        lookahead: the decision for a token depends on later tokens.
        agreement: scalar, agreement of the causal predictor with the decision; None without a predictor.
        skipped: no row has a selected token and the layer is skipped.
        routed: scorer and selector ran; False where every token is kept and nothing learns.
    """

    scored: Scored
    decision: Decision
    estimate: Estimate
    keep: float
    lookahead: bool
    agreement: Tensor | None
    skipped: bool
    routed: bool = True


@dataclass(frozen=True)
class Temperature:
    """Temperature of soft decisions over training: it divides the scores, and falls or rises by the same factor at each step.

    Args:
        start: temperature at the first step.
        end: temperature at the last step; None keeps that of the start.
        part: name of the estimator, for messages.

    Raises:
        ValueError: a temperature is no number above 0.
    """

    start: float
    end: float | None
    part: str

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.start), ("final_temperature", 1.0 if self.end is None else self.end)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"estimator {self.part!r}: {name} = {value!r} must be a number above 0")

    def at(self, progress: float | Tensor) -> float | Tensor:
        """The temperature when this share of training, from 0 to 1, is done."""
        course: float | Tensor = self.start * ((self.start if self.end is None else self.end) / self.start) ** progress
        return course


class Estimator(nn.Module):
    """Runs after a trained scorer; only in training unless ``in_evaluation`` is set.

    Attributes:
        in_evaluation: the estimator changes the forward's values and is a part of the model.
        bypass_only: it is for bypass sites only.
        of_bypassed: it changes tokens that bypass the layer too, so that the layer is not skipped where no token is selected.
        needs_answers: it is trained on ``Scored.answers``, of a scorer whose tokens answer the task.
        needs_attention: its gradient comes through the attention of later layers.
        needs_chunks: its gradient comes through a restore by ``dechunk``.
    """

    in_evaluation: ClassVar[bool] = False
    bypass_only: ClassVar[bool] = False
    of_bypassed: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False
    needs_chunks: ClassVar[bool] = False

    @property
    def weighs_training(self) -> bool:
        """Tokens have weights in training that they do not have in evaluation."""
        return False

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        """
        Args:
            inputs: the tokens before the decision; in their state, tokens outside the stage's scope are protected.
            scored: output of the scorer; the scores have a gradient.
            decision: the tokens to keep.
        """
        raise NotImplementedError
