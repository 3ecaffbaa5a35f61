"""What every selector shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..state import Decision, TokenState
from ..subsets import compact


@dataclass(frozen=True)
class Request:
    """How many tokens a selector is asked for, and what it may draw.

    Attributes:
        keep: fraction of the routable tokens, in (0, 1].
        count: routable tokens of each row by the stage's count rule, an int for all rows or int64 (B,).
        noise: strength of the exploration in training; 0 explores nothing.
        draws: (B, M) uniform draws in (0, 1); None where nothing is explored.
    """

    keep: float
    count: int | Tensor
    noise: float | Tensor = 0.0
    draws: Tensor | None = None


class Selector(nn.Module):
    """Scores and a request in, a decision out.

    Attributes:
        lookahead: the decision for a token depends on later tokens.
        adaptive: rows keep different numbers of tokens; only their mean is what was asked for.
        needs_probabilities: it takes the sigmoid of a score for the probability to keep.
    """

    lookahead: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    needs_probabilities: ClassVar[bool] = False

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        """
        Args:
            scores: (B, M) float32, higher means keep.
            state: the tokens at the site.
            request: how many to keep.
        """
        raise NotImplementedError


def everything(state: TokenState) -> Decision:
    """The decision that leaves nothing out."""
    return Decision(torch.arange(state.tokens, device=state.position.device).expand_as(state.position), state.valid)


def decide(stays: Tensor, scores: Tensor, state: TokenState) -> Decision:
    """The decision that a mask means; a row whose mask is empty keeps its best token all the same.

    Args:
        stays: (B, M) bool; protected tokens and padding are seen to here.
        scores: (B, M) float32.
        state: the tokens at the site.
    """
    best = scores.masked_fill(~state.routable, float("-inf")).argmax(-1, keepdim=True)
    stays = (stays & state.routable).scatter(1, best, True) & state.routable
    kept = compact(stays | state.protected if state.valid is None else stays | (state.protected & state.valid))
    return Decision(kept.index, kept.valid)
