"""Keeps a stage from emptying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...cost.cost import CostModel
from ...tokens.trace import Routing
from .base import Regularizer, mean_keep


@dataclass(frozen=True)
class MinimumActivation(Regularizer):
    """Sum over stages of max(0, lowest - mean keep): no stage may stop processing tokens (Dynamic Tuning, arXiv 2403.11808, with lowest
    0.1).

    It holds no ratio: the budget's controller does.

    Attributes:
        weight: weight of the loss at the end of its ramp.
        lowest: mean keep below which a stage costs.
    """

    holds_ratio: ClassVar[bool] = False
    weight: float = 1.0
    lowest: float = 0.1

    def __call__(
        self,
        routings: Sequence[Routing],
        target: float | None,
        cost: CostModel,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        keeps = [mean_keep(routing, over_ranks) for routing in routings]
        return torch.stack([(self.lowest - keep).clamp(min=0) * some for keep, some in keeps]).sum()
