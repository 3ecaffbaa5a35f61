"""Squared distance of the soft keep from the requested one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, soft_keep


@dataclass(frozen=True)
class RatioMSE(StageRegularizer):
    """mean over stages and rows of (mean keep probability - keep)² (DynamicViT, arXiv 2106.02034, which weighs it by 2).

    Where rows keep as many as they like, the mean over the rows is held, not every row.
    """

    weight: float = 2.0

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept = soft_keep(routing)
        if routing.adaptive:
            kept = kept.mean() if over_ranks is None else over_ranks(kept.mean())
        return (kept - routing.requested).square().mean()
