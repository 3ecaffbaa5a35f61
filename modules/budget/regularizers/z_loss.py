"""Size of the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_over


@dataclass(frozen=True)
class ZLoss(StageRegularizer):
    """Mean over stages and tokens of the squared log-partition of a router's two classes (the z-loss of ST-MoE, arXiv 2202.08906).

    A score s is a log-odd, so that the logits of keep and drop are s/2 and -s/2, and their log-partition is log(2·cosh(s/2)). It is least
    at s = 0 and grows as |s|/2: large scores, whose sigmoid has no gradient left, are pulled back from either side. It holds no ratio: the
    budget's controller does.
    """

    holds_ratio: ClassVar[bool] = False
    weight: float = 1e-3

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        scores = routing.scores
        # log(2·cosh(s/2)) = softplus(s) - s/2, finite wherever the score is.
        return mean_over((functional.softplus(scores) - scores / 2).square(), routing.routable, over_ranks)
