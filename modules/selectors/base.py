"""Selector: the base class of all selectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.decision import Decision
from ..tokens.gather import compact
from ..tokens.state import TokenState

_BUCKET = 16


@dataclass(frozen=True)
class Request:
    """The requested number of tokens, and the inputs of a selector besides the scores.

    Attributes:
        keep: requested fraction of the routable tokens, in (0, 1].
        count: requested routable tokens by the stage's count rule: an int for all rows, or int64 (B,) per row; in packed rows
            int64 (B, D) per document.
        hidden_states: (B, M, C) hidden states at the site, for selectors that read them; None otherwise.
        lookahead: non-causal decisions are allowed in evaluation too.
        noise: strength of the exploration noise in training; 0 for none.
        draws: (B, M) uniform draws in (0, 1); None if neither exploration noise nor the selector needs them.
        own: the stage's own keep, from which ``keep`` differs if it is of this forward alone; None if the stage has none.
        alone: no other process runs this forward.
    """

    keep: float
    count: int | Tensor
    hidden_states: Tensor | None = None
    lookahead: bool = False
    noise: float | Tensor = 0.0
    draws: Tensor | None = None
    own: float | None = None
    alone: bool = False


@dataclass(frozen=True)
class Auxiliary:
    """Auxiliary loss and agreement of a selector that is trained on decisions.

    Attributes:
        loss: scalar to add to the task's loss in training; None without one.
        agreement: scalar, fraction of the routable tokens for which the deployed rule gives the same decision; None without it.
    """

    loss: Tensor | None = None
    agreement: Tensor | None = None


class Selector(nn.Module):
    """Turns scores and a Request into a Decision.

    Args:
        spec: the tokens to select from.
        bucket: if rows keep different numbers of tokens, the padded length is a multiple of ``bucket``, so that shapes repeat. None means
            16 in a causal model and 1 otherwise.

    Attributes:
        lookahead: in evaluation, the decision for a token depends on later tokens.
        adaptive: rows keep different numbers of tokens; only their mean meets the request.
        needs_probabilities: the selector uses the sigmoid of a score as the keep probability.
        cuts: a token is kept if its score is above a threshold, ``Decision.cut``.
        one_keep: in evaluation it keeps the share that it was trained for, whatever keep is requested.
        draws: the selector needs ``Request.draws`` in evaluation too.
        explores: exploration noise is logistic noise on the scores that are compared with the cut.
        ignores_noise: its decisions have no exploration noise.
        by_scores: decisions in evaluation follow the scores.
        float32_buffers: names of buffers that stay float32 when the model is loaded in or cast to another dtype.
    """

    lookahead: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    needs_probabilities: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    # A class variable or a property.
    one_keep: bool = False
    draws: ClassVar[bool] = False
    explores: ClassVar[bool] = False
    ignores_noise: ClassVar[bool] = False
    by_scores: ClassVar[bool] = True
    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: TokenSpec, bucket: int | None = None) -> None:
        super().__init__()
        if bucket is not None and bucket < 1:
            raise ValueError(f"bucket = {bucket} must be at least 1")
        self.causal = spec.causal
        self.bucket = bucket or (_BUCKET if spec.causal else 1)

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        """
        Args:
            scores: (B, M) float32, higher means keep.
            state: the tokens at the site.
            request: the requested number of tokens.
        """
        raise NotImplementedError

    @property
    def uncalibrated(self) -> bool:
        """Evaluation compares with a threshold that has seen no score yet. Synchronises with the device."""
        return False

    @property
    def calibrates(self) -> bool:
        """It has a threshold that follows scores."""
        return False

    def reset(self) -> None:
        """The threshold as it is before the first score."""

    def set_cut(self, keep: float) -> None:
        """Sets the threshold so that this fraction of scores that are uniform in (0, 1) is kept, without training."""

    def move_cut(self, before: float | None, keep: float) -> None:
        """Moves a threshold that follows scores from one keep of the stage, None if it has none, to another one."""

    def is_noncausal(self, request: Request) -> bool:
        """The decision for this request will depend on later tokens."""
        return self.lookahead

    def auxiliary(self, decision: Decision, state: TokenState, request: Request) -> Auxiliary:
        """Auxiliary loss and agreement for a decision, for selectors that are trained on decisions."""
        return Auxiliary()

    def macs(self, shape: StackShape, tokens: int) -> int:
        """MACs in evaluation for one row of ``tokens`` tokens, protected tokens included."""
        return 0

    def decide(self, stays: Tensor, scores: Tensor, state: TokenState) -> Decision:
        """The Decision for a mask of the tokens to keep.

        Non-causal: an empty row keeps its top-scoring token. Causal: it keeps none, because picking the best would depend on future
        tokens.

        Args:
            stays: (B, M) bool; values at protected tokens, which are always kept, and at padding are ignored.
            scores: (B, M) float32.
            state: the tokens at the site.
        """
        if state.counts is None or state.counts.protected:
            stays = stays & state.routable
        if not self.causal:
            best = scores.masked_fill(~state.routable, float("-inf")).argmax(-1, keepdim=True)
            stays = stays.scatter(1, best, True) & state.routable
        if state.counts is None or state.counts.protected:
            stays = stays | (state.protected if state.valid is None else state.protected & state.valid)
        if self.causal and state.tokens == 1:
            return _of_single_tokens(stays)
        kept = compact(stays, bucket=self.bucket)
        return Decision(kept.index, kept.valid, self.causal and kept.empty)


def _of_single_tokens(stays: Tensor) -> Decision:
    """The Decision for a (B, 1) mask, as in generation: rows whose token is kept are listed in ``rows``."""
    rows = [row for row, (stay,) in enumerate(stays.tolist()) if stay]
    there = torch.tensor(rows, dtype=torch.int64, device=stays.device)
    return Decision(torch.zeros_like(stays, dtype=torch.int64), stays, empty=not rows, rows=there)


def everything(state: TokenState) -> Decision:
    """The Decision that keeps every token."""
    slots = torch.arange(state.tokens, device=state.position.device)
    return Decision(slots.expand_as(state.position), state.valid, everything=True)
