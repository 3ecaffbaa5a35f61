"""Keep above the requested keep; nothing below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_keep


@dataclass(frozen=True)
class Hinge(StageRegularizer):
    """Mean over stages of max(0, mean keep - keep): one-sided, so that a stage may keep less than requested (DMC, arXiv 2403.09636).

    It is max(0, t - f) in terms of the share f that is removed, with t the share to remove.
    """

    grows = False
    weight: float = 1.0

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept, some = mean_keep(routing, over_ranks)
        return (kept - routing.requested).clamp(min=0) * some
