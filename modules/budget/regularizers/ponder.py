"""Ponder cost: every token that goes on costs."""

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
class Ponder(Regularizer):
    """Mean number of stages that a token passes, plus ``prior`` · KL(where tokens stop ‖ where the requested keeps stop them)
    (A-ViT, arXiv 2112.07658, with weights 5e-4 and 1e-3).

    A token stops at the stage that does not keep it, or after the last one. The first term pulls towards fewer tokens without end: the
    prior, or the budget's controller, holds the ratio. Around layers, where tokens go on, it is the mean number of layers that process a
    token, without the divergence.

    Attributes:
        weight: weight of the loss at the end of its ramp.
        prior: weight of the divergence relative to the first term.
    """

    holds_ratio: ClassVar[bool] = False
    weight: float = 5e-4
    prior: float = 2.0

    def __call__(
        self,
        routings: Sequence[Routing],
        target: float | None,
        cost: CostModel,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        keeps = torch.stack([mean_keep(routing, over_ranks)[0] for routing in routings])
        if any(it.bypass for it in routings):
            # Around layers a token that one layer does not process is there for the next one.
            return keeps.sum()
        passed, stops = stopping(keeps)
        _, wanted = stopping(torch.stack([torch.full_like(keeps[0], it.requested) for it in routings]))
        small = torch.finfo(keeps.dtype).tiny
        divergence = (stops * (stops.clamp(min=small).log() - wanted.clamp(min=1e-6).log())).sum()
        return passed + self.prior * divergence


def stopping(keeps: Tensor) -> tuple[Tensor, Tensor]:
    """The mean number of stages that a token passes, and the (S + 1,) share of tokens that stop at each of S stages or at none.

    Args:
        keeps: (S,) share of its tokens that each stage keeps.
    """
    left = keeps.cumprod(0)
    before = torch.cat([torch.ones_like(left[:1]), left])
    return left.sum(), torch.cat([before[:-1] - left, left[-1:]])
