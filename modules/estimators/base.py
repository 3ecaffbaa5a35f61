"""What every estimator shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision


@dataclass(frozen=True)
class Estimate:
    """Paths for the gradient. Each leaves the forward's values untouched, unless the estimator runs in evaluation too.

    Attributes:
        scale: (B, M), multiplied onto the tokens that stay, where it has the value 1; around a layer, onto what the layer adds. None leaves
            them alone.
        key_bias: (B, M) of value 0, added to the attention logits of each key in all later layers; None adds nothing.
        confidence: (B, M) of value 1, multiplied onto what each token is given at a restore by ``dechunk``; None leaves it alone.
        loss: scalar to add to the task's loss, already weighted; None without one.
    """

    scale: Tensor | None = None
    key_bias: Tensor | None = None
    confidence: Tensor | None = None
    loss: Tensor | None = None


class Estimator(nn.Module):
    """Runs behind a trained scorer, in training only unless it says otherwise.

    Attributes:
        in_evaluation: what it does is a part of the model, and not a path for the gradient alone.
        bypass_only: it is for stages around a layer or one of its halves.
        needs_answers: it learns from the answers of a scorer whose tokens answer the task.
        needs_attention: its gradient comes through the attention of later layers.
        needs_chunks: its gradient comes through a restore by ``dechunk``.
    """

    in_evaluation: ClassVar[bool] = False
    bypass_only: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False
    needs_chunks: ClassVar[bool] = False

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        """
        Args:
            inputs: the tokens before the decision; those outside the stage's scope are protected in its state.
            scored: what the scorer found, scores with gradient.
            decision: which tokens stay.
        """
        raise NotImplementedError
