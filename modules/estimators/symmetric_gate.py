"""Symmetric gate estimator: a bounded weight on what a layer adds to its tokens, and on the tokens that bypass it."""

from __future__ import annotations

import torch

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class SymmetricGateEstimator(Estimator):
    """With g = 1 + strength · tanh(score), a processed token x becomes x + g · f(x), and one that bypasses the layer g · x, in evaluation too
    (p-MoD, arXiv 2412.04449, whose code weights of f only what the MLP adds).

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
        weight = 1 + self.strength * torch.tanh(scored.scores)
        return Estimate(scale=weight, bypassed=weight)
