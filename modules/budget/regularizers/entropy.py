"""Entropy of the keep probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_over


@dataclass(frozen=True)
class Entropy(StageRegularizer):
    """Mean over stages and tokens of the entropy of the keep probability, in nats: moves soft decisions to hard ones.

    Decisions near one half flip between training and use. The pull has no side, and holds no ratio: the budget's controller does.
    """

    holds_ratio: ClassVar[bool] = False
    weight: float = 0.1

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        soft, scores = routing.soft, routing.scores
        assert soft is not None
        # H(σ(s)) = softplus(s) - s·σ(s), finite wherever the score is.
        return mean_over(functional.softplus(scores) - scores * soft, routing.routable, over_ranks)
