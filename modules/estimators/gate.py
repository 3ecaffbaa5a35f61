"""The score weighs what the layer adds, in evaluation too."""

from __future__ import annotations

import torch
from torch import nn

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class GateEstimator(Estimator):
    """x + (1 + a·tanh(score / 2))·f(x) around a layer, a learned: what it adds counts more where the router is surer
    (Mixture-of-Depths, arXiv 2404.02258, which multiplies by the score itself).

    With a = 0 the weight is 1, and a pretrained layer is left as it is; a learns from the first step on, the score through it.
    Once it has, the weights are part of the model: they are there in evaluation too, and at capacity 1 it is not the dense one.

    Args:
        start: of a.
    """

    in_evaluation = True
    bypass_only = True

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        # One value in one dimension: what shards parameters has no use for those without any.
        self.strength = nn.Parameter(torch.full((1,), float(start)))

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        # A copy: what backward needs of a parameter itself is gone where ZeRO-3 has taken it apart again after the forward.
        strength = self.strength.float().clone()
        return Estimate(scale=1 + strength * torch.tanh(scored.scores / 2))
