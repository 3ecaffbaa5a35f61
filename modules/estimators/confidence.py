"""Confidence estimator: straight-through weights on the update that tokens get in a restore by ``dechunk``."""

from __future__ import annotations

import torch

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator, Temperature


class ConfidenceEstimator(Estimator):
    """c + sg(1 − c) on the update that a token gets in a restore by ``dechunk``, with c the probability of its decision: p if a chunk
    begins at it, 1 − p if not (H-Net, arXiv 2507.07955).

    The value is 1. If the update reduces the loss, the gradient increases the probability of the decision, at every token.
    ``straight_through`` has less effect here: the restore uses the layers' update, and pre-norm layers ignore the scale of their input.

    Args:
        temperature: τ at the first step, p = sigmoid(score ÷ τ).
        final_temperature: τ at the last step; None keeps it.
    """

    needs_chunks = True

    def __init__(self, temperature: float = 1.0, final_temperature: float | None = None) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, final_temperature, "confidence")

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        probability = torch.sigmoid(scored.scores / self.temperature.at(inputs.trace.progress))
        decided = torch.where(decision.kept_mask(inputs.state.tokens), probability, 1 - probability)
        return Estimate(confidence=1 + (decided - decided.detach()))
