"""Symmetric gate estimator: a bounded weight on every token behind a layer, whether the layer processed it or not."""

from __future__ import annotations

import torch

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class SymmetricGateEstimator(Estimator):
    """Tokens behind the layer × (1 + strength · tanh(score)), processed or not (p-MoD, arXiv 2412.04449), in evaluation too.

    With scores of 0, as scorer ``{name: linear, zero: true}`` has them at first, the weight is 1 and a pretrained model is unchanged. All
    tokens of the scope teach the scorer, also those that bypass the layer.

    Args:
        strength: largest difference of the weight from 1.
    """

    in_evaluation = True
    bypass_only = True
    of_bypassed = True

    def __init__(self, strength: float = 0.2) -> None:
        super().__init__()
        if not 0 < strength < 1:
            raise ValueError(f"estimator 'symmetric_gate': strength = {strength} must be between 0 and 1")
        self.strength = strength

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        return Estimate(weight=1 + self.strength * torch.tanh(scored.scores))
