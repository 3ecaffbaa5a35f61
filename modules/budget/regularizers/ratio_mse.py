"""Squared distance of the soft keep from the requested keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_over, soft_keep


@dataclass(frozen=True)
class RatioMSE(StageRegularizer):
    """mean over stages and rows of (mean keep probability - keep)² (DynamicViT, arXiv 2106.02034, with weight 2).

    If rows keep different numbers of tokens, the mean over rows is compared, not each row.
    """

    weight: float = 2.0

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept, counted = soft_keep(routing), routing.routable.any(-1)
        if routing.adaptive:
            # Without a routable token on any process there is nothing to hold.
            return (mean_over(kept, counted, over_ranks) - routing.requested).square() * counted.any()
        return mean_over((kept - routing.requested).square(), counted, over_ranks)
