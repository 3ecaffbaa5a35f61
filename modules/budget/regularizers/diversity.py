"""Spread of the keep over rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, by_place, check_places


@dataclass(frozen=True)
class Diversity(StageRegularizer):
    """Mean over stages of 1 - V ÷ m(1-m), with V the variance over the rows of a batch of the mean keep probability at a place, averaged
    over places, and m the mean keep: 1 if every row keeps the same places, 0 if rows differ as much as a keep of m allows.

    ``uniformity`` is content with a router that gives every token the same probability; this one is not. Some data ask for the same places
    in every row: images with an object in the middle. It holds no ratio: the budget's controller does.

    Attributes:
        weight: weight of the loss at the end of its ramp.
        places: number of places that a row is divided into, by the position of a token in its row.
    """

    holds_ratio: ClassVar[bool] = False
    weight: float = 0.1
    places: int = 64

    def __post_init__(self) -> None:
        check_places("diversity", self.places)

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        kept, tokens = by_place(routing, self.places)
        there = (tokens > 0).to(kept.dtype)
        mean = kept / tokens.clamp(min=1)
        # (3, places): rows that have the place, and sums of their mean and of its square.
        sums = torch.stack([there.sum(0), (mean * there).sum(0), (mean.square() * there).sum(0)])
        rows, first, second = sums if over_ranks is None else over_ranks(sums)
        rows = rows.detach()
        # A mean of counts over processes may be below 1.
        number = rows.clamp(min=torch.finfo(rows.dtype).tiny)
        variance = (second / number - (first / number).square()).clamp(min=0)
        total = rows.sum().clamp(min=torch.finfo(rows.dtype).tiny)
        keep = (first.sum() / total).detach()
        # Without gradient: the bound would pull the keep to one half.
        share: Tensor = (variance * rows).sum() / total / (keep * (1 - keep)).clamp(min=1e-6)
        return 1 - share
