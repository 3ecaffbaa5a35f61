"""Squared distance of the soft keep from the requested keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_keep, mean_over, soft_keep


@dataclass(frozen=True)
class RatioMSE(StageRegularizer):
    """mean over stages and rows of (mean keep probability - keep)² (DynamicViT, arXiv 2106.02034, with weight 2).

    If rows keep different numbers of tokens, the mean over rows is compared, not each row.
    """

    weight: float = 2.0

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        if routing.adaptive:
            kept, some = mean_keep(routing, over_ranks)
            # Without a routable token on any process there is nothing to hold.
            return (kept - routing.requested).square() * some
        return mean_over((soft_keep(routing) - routing.requested).square(), routing.routable.any(-1), over_ranks)
