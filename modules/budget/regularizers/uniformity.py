"""Spread of the keep over places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, by_place, check_places


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
        check_places("uniformity", self.places)

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept, counted = (it.sum(0) for it in by_place(routing, self.places))
        if over_ranks is not None:
            kept, counted = over_ranks(kept), over_ranks(counted)
        there = counted > 0
        share = kept / torch.where(there, counted, 1)
        mean = (share * there).sum() / there.sum().clamp(min=1)
        return ((share - mean).square() * there).sum() / there.sum().clamp(min=1)
