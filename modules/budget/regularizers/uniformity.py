"""Spread of the keep over places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer


@dataclass(frozen=True)
class Uniformity(StageRegularizer):
    """Mean over stages of the variance, over places, of the mean keep probability at a place: 0 if every place of the input is kept
    equally often over a batch, whatever is kept in each row.

    A router may learn places in place of contents (position bias). With few rows in a batch the variance is mostly that of the contents,
    so that the batch should be large. It holds no ratio: the budget's controller does.

    Attributes:
        weight: weight of the loss at the end of its ramp.
        places: number of places that a row is divided into, by the position of a token in its row.
    """

    holds_ratio: ClassVar[bool] = False
    weight: float = 1.0
    places: int = 16

    def __post_init__(self) -> None:
        if self.places < 2:
            raise ValueError(f"regularizer 'uniformity': places = {self.places} must be at least 2")

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        soft, position = routing.soft, routing.state.position
        assert soft is not None
        weight = routing.routable.to(soft.dtype)
        last = (position + 1).masked_fill(~routing.routable, 0).amax(-1, keepdim=True).clamp(min=1)
        place = (position * self.places // last).clamp(0, self.places - 1)
        kept, counted = (torch.zeros(self.places, dtype=soft.dtype, device=soft.device).index_add(0, place.flatten(), it.flatten())
                         for it in (soft * weight, weight))  # fmt: skip
        if over_ranks is not None:
            kept, counted = over_ranks(kept), over_ranks(counted)
        there = counted > 0
        share = kept / torch.where(there, counted, 1)
        mean = (share * there).sum() / there.sum().clamp(min=1)
        return ((share - mean).square() * there).sum() / there.sum().clamp(min=1)
