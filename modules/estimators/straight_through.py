"""Straight-through estimator: straight-through weights on the kept tokens."""

from __future__ import annotations

import torch

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator, Temperature


class StraightThroughEstimator(Estimator):
    """x * (1 + (s - sg(s))) with s = sigmoid(score ÷ τ): the value is unchanged, and s gets the gradient <x, dL/dx>.

    A pre-norm layer ignores the scale of its input, so the gradient reaches the score only through the residual stream and is weak on
    ViTs. ``key_bias`` gives a stronger gradient but needs an attention mask; the ``evidence`` scorer needs neither.

    Args:
        temperature: τ at the first step. A high one teaches scores far from the cut too, a low one those near it alone.
        final_temperature: τ at the last step; None keeps it.
    """

    def __init__(self, temperature: float = 1.0, final_temperature: float | None = None) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, final_temperature, "straight_through")

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        soft = torch.sigmoid(scored.scores / self.temperature.at(inputs.trace.progress))
        return Estimate(scale=1 + (soft - soft.detach()))
