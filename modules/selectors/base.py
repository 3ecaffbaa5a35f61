"""What every selector shares."""

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
    """How many tokens a selector is asked for, and what it may draw.

    Attributes:
        keep: fraction of the routable tokens, in (0, 1].
        count: routable tokens of each row by the stage's count rule, an int for all rows or int64 (B,); where rows are packed
            documents, int64 (B, D) of each document.
        hidden_states: (B, M, C) the tokens themselves, for a selector that looks at them.
        lookahead: in evaluation too, the decision may look at later tokens.
        noise: strength of the exploration in training; 0 explores nothing.
        draws: (B, M) uniform draws in (0, 1); None where nothing is explored.
    """

    keep: float
    count: int | Tensor
    hidden_states: Tensor | None = None
    lookahead: bool = False
    noise: float | Tensor = 0.0
    draws: Tensor | None = None


@dataclass(frozen=True)
class Auxiliary:
    """What a selector that learns says of a decision.

    Attributes:
        loss: scalar to add to the task's loss in training; None without one.
        agreement: scalar, share of the routable tokens on which what is deployed agrees with the decision; None without it.
    """

    loss: Tensor | None = None
    agreement: Tensor | None = None


class Selector(nn.Module):
    """Scores and a request in, a decision out.

    Args:
        spec: the tokens that it chooses from.
        bucket: where rows keep different numbers, they are filled up to a multiple of it, so that shapes repeat; None takes 16 in
            a causal model and 1 elsewhere.

    Attributes:
        lookahead: in evaluation, the decision for a token depends on later tokens.
        adaptive: rows keep different numbers of tokens; only their mean is what was asked for.
        needs_probabilities: it takes the sigmoid of a score for the probability to keep.
        cuts: a token stays where its score is above a value, which the decision tells.
        draws: it needs ``Request.draws`` in evaluation too.
        float32_buffers: names of buffers that stay float32 in a model of any dtype, loaded or cast.
    """

    lookahead: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    needs_probabilities: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    draws: ClassVar[bool] = False
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
            request: how many to keep.
        """
        raise NotImplementedError

    def set_cut(self, keep: float) -> None:
        """Makes a selector that cuts scores keep this fraction of scores that are uniform in (0, 1), without any training."""

    def looks_ahead(self, request: Request) -> bool:
        """This very decision will depend on later tokens."""
        return self.lookahead

    def auxiliary(self, decision: Decision, state: TokenState, request: Request) -> Auxiliary:
        """What a selector that learns from its own decisions has to say of one."""
        return Auxiliary()

    def macs(self, shape: StackShape, tokens: int) -> int:
        """MACs in evaluation for one row of ``tokens`` tokens, protected ones included."""
        return 0

    def decide(self, stays: Tensor, scores: Tensor, state: TokenState) -> Decision:
        """The decision that a mask means.

        Non-causal: an empty row keeps its top-scoring token. Causal: it keeps none, because picking the best would depend on future
        tokens.

        Args:
            stays: (B, M) bool; protected tokens and padding are seen to here.
            scores: (B, M) float32.
            state: the tokens at the site.
        """
        if state.counts is None or state.counts.protected:
            stays = stays & state.routable
        if not self.causal:
            best = scores.masked_fill(~state.routable, float("-inf")).argmax(-1, keepdim=True)
            stays = stays.scatter(1, best, True) & state.routable
        stays = stays | (state.protected if state.valid is None else state.protected & state.valid)
        if self.causal and state.tokens == 1:
            return _of_single_tokens(stays)
        kept = compact(stays, bucket=self.bucket)
        return Decision(kept.index, kept.valid, self.causal and kept.empty)


def _of_single_tokens(stays: Tensor) -> Decision:
    """The decision that a (B, 1) mask means, as while generating: rows stay or are left out."""
    rows = [row for row, (stay,) in enumerate(stays.tolist()) if stay]
    there = torch.tensor(rows, dtype=torch.int64, device=stays.device)
    return Decision(torch.zeros_like(stays, dtype=torch.int64), stays, empty=not rows, rows=there)


def everything(state: TokenState) -> Decision:
    """The decision that leaves nothing out."""
    slots = torch.arange(state.tokens, device=state.position.device)
    return Decision(slots.expand_as(state.position), state.valid, everything=True)
