"""Binomial prior on the number of kept tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_over, soft_keep


@dataclass(frozen=True)
class Binomial(StageRegularizer):
    """Mean over stages and rows of -log Binom(n, keep)(k) / n: n routable tokens, k kept ones, keep the requested share
    (dynamic token pooling, arXiv 2211.09761).

    Each row is compared by itself, and one of few tokens may stray further than one of many. Between whole numbers k is continued by the
    gamma function.
    """

    weight: float = 1.0

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        number = routing.routable.sum(-1)
        return mean_over(surprise(soft_keep(routing) * number, number, routing.requested), number > 0, over_ranks)


def surprise(kept: Tensor, number: Tensor, keep: float) -> Tensor:
    """(B,) -log Binom(number, keep)(kept) / number; 0 for rows without a token, and at keep 1, where there is nothing to hold.

    Args:
        kept: (B,) kept tokens, fractional.
        number: (B,) int64 tokens.
        keep: probability of a token to be kept.
    """
    if keep >= 1:
        return kept * 0
    total = number.to(kept.dtype)
    ways = torch.lgamma(total + 1) - torch.lgamma(kept + 1) - torch.lgamma(total - kept + 1)
    return -(ways + kept * math.log(keep) + (total - kept) * math.log(1 - keep)) / total.clamp(min=1)
