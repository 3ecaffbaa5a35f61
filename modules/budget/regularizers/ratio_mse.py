"""Squared distance of the soft keep from the requested one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cost import CostModel
from ...state import Routing
from .base import Regularizer, soft_keep


@dataclass(frozen=True)
class RatioMSE(Regularizer):
    """mean over stages and rows of (mean keep probability - keep)² (DynamicViT, arXiv 2106.02034, which weighs it by 2).

    Where rows keep as many as they like, the mean over the rows is held, not every row.
    """

    weight: float = 2.0

    def __call__(
        self,
        routings: Sequence[Routing],
        target: float | None,
        cost: CostModel,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        return torch.stack([self._distance(routing, over_ranks) for routing in routings]).mean()

    @staticmethod
    def _distance(routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept = soft_keep(routing)
        if routing.adaptive:
            kept = kept.mean() if over_ranks is None else over_ranks(kept.mean())
        return (kept - routing.requested).square().mean()
