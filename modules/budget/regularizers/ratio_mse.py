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

    Attributes:
        per: ``row`` compares the keep of each row, ``batch`` that of all tokens. None takes ``batch`` where the selector lets rows keep
            different numbers, and ``row`` elsewhere.
    """

    weight: float = 2.0
    per: str | None = None

    def __post_init__(self) -> None:
        if self.per not in (None, "row", "batch"):
            raise ValueError(f"regularizer 'ratio_mse': per = {self.per!r} must be row, batch or null")

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        if self.per == "batch" or (self.per is None and routing.adaptive):
            kept, some = mean_keep(routing, over_ranks)
            # Without a routable token on any process there is nothing to hold.
            return (kept - routing.requested).square() * some
        return mean_over((soft_keep(routing) - routing.requested).square(), routing.routable.any(-1), over_ranks)
