"""Squared distance of the soft ``macs_ratio`` from the requested one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...cost.cost import CostModel
from ...tokens.trace import Routing
from .base import Regularizer, kept_of_rows, kept_share, mean_keep


@dataclass(frozen=True)
class MacsSquared(Regularizer):
    """(soft macs_ratio - target)², with the MACs of the soft token counts (LTMP, arXiv 2305.19115, with weight 10).

    If the budget's measure is not ``macs_ratio``, the target is the ``macs_ratio`` of the requested keeps. Beside stages that leave the count
    to their router, the others count as what they keep, which does not move with their probabilities.
    """

    weight: float = 10.0

    def __call__(
        self,
        routings: Sequence[Routing],
        target: float | None,
        cost: CostModel,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        keeps = {routing.stage: mean_keep(routing, over_ranks)[0] for routing in routings}
        if any(routing.free for routing in routings):
            fixed = {routing.stage: (routing, routing.routable.sum(-1).float()) for routing in routings if not routing.free}
            keeps |= {
                name: kept_share(kept_of_rows(routing, present), present, over_ranks)[0] for name, (routing, present) in fixed.items()
            }
        soft = cost.soft(keeps)
        if target is not None:
            return (soft - target).square()
        return (soft - cost.soft({routing.stage: soft.new_full((), routing.requested) for routing in routings})).square()
