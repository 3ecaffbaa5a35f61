"""Gate estimator: the score scales the layer's update, in evaluation too."""

from __future__ import annotations

import torch
from torch import nn

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class GateEstimator(Estimator):
    """x + (1 + a·tanh(score / 2))·f(x) at a bypass site, with a learned: the update has more weight for tokens with a higher score
    (Mixture-of-Depths, arXiv 2404.02258, which multiplies by the score itself).

    With a = 0 the weight is 1, so a pretrained layer is unchanged; a gets a gradient from the first step, the score once a differs
    from 0. The weights are a part of the model: they apply in evaluation too, and with keep 1 the model differs from the dense one.

    Args:
        start: initial value of a.
    """

    in_evaluation = True
    bypass_only = True

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        # One value in one dimension: sharding does not support parameters with zero dimensions.
        self.strength = nn.Parameter(torch.full((1,), float(start)))

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        strength = self.strength.float()
        if torch.is_grad_enabled():
            # A copy: what backward needs of a parameter itself is gone where ZeRO-3 has taken it apart again after the forward.
            strength = strength.clone()
        return Estimate(scale=1 + strength * torch.tanh(scored.scores / 2))
