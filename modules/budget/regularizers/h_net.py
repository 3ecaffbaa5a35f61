"""Ratio loss of H-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...tokens.trace import Routing
from .base import StageRegularizer, mean_over


@dataclass(frozen=True)
class HNet(StageRegularizer):
    """Mean over stages of N/(N−1)·[(N−1)·F·G + (1−F)(1−G)]: F the fraction of tokens kept, G their mean probability, 1/N the
    requested keep (H-Net, arXiv 2507.07955, with weight 0.03).

    It is 1 if both equal the requested keep. F has no gradient; the gradient of G lowers it while F is too large and raises it while F is
    too small. The value alone says little (F = 1 with G = 0 gives 0): use the achieved and the soft keep, which are logged separately.

    Attributes:
        weight: weight of the loss at the end of its ramp.
    """

    weight: float = 0.03

    def of_stage(self, routing: Routing, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        probabilities, routable = routing.soft, routing.routable
        assert probabilities is not None
        # Average before the product: the mean of products differs from the product of means.
        soft, hard = (mean_over(values, routable, over_ranks) for values in (probabilities, routing.kept_mask.to(probabilities.dtype)))
        return ratio_loss(hard.detach(), soft, routing.requested)


def ratio_loss(hard: Tensor, soft: Tensor, requested: float) -> Tensor:
    """Scalar: the loss of one stage.

    Args:
        hard: scalar F.
        soft: scalar G.
        requested: 1/N; at 1 the loss is 0.
    """
    if requested >= 1:
        return soft * 0
    number = 1 / requested
    return number / (number - 1) * ((number - 1) * hard * soft + (1 - hard) * (1 - soft))
