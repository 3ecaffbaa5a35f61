"""Straight-through weights on the tokens that stay."""

from __future__ import annotations

import torch

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class StraightThroughEstimator(Estimator):
    """x * (1 + (s - sg(s))) with s = sigmoid(score): the value is untouched, the score gets <x, dL/dx>.

    A pre-norm layer does not see the scale of its input, so this gradient reaches the score only by way of the residual
    stream and is weak on ViTs; ``key_bias`` is the sharper signal at the price of a mask, the ``evidence`` scorer needs neither.
    """

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        soft = torch.sigmoid(scored.scores)
        return Estimate(scale=1 + (soft - soft.detach()))
