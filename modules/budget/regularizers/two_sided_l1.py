"""Absolute distance of the keep from the requested keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_keep


@dataclass(frozen=True)
class TwoSidedL1(StageRegularizer):
    """Mean over stages of abs(mean keep - keep) (SkipGPT, arXiv 2506.04179, with weight 20).

    Its pull does not weaken near the target, so that a penalty of fixed weight can hold it where the weight is above the pull of the task.
    """

    grows = False
    weight: float = 20.0

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept, some = mean_keep(routing, over_ranks)
        return (kept - routing.requested).abs() * some
