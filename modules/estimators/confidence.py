"""Straight-through weights on what tokens are given of their chunk."""

from __future__ import annotations

import torch

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class ConfidenceEstimator(Estimator):
    """c + sg(1 − c) on what a token gets at a restore by ``dechunk``, with c the probability of what was decided for it: p where a
    chunk begins, 1 − p where none does (H-Net, arXiv 2507.07955).

    The value is 1. Where what a token was given helps, the router grows surer of its decision, at every token. ``straight_through``
    would reach it less: the restore takes what layers added, and pre-norm layers do not see the scale of their input.
    """

    needs_chunks = True

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        probability = torch.sigmoid(scored.scores)
        sure = torch.where(decision.kept_mask(inputs.state.tokens), probability, 1 - probability)
        return Estimate(confidence=1 + (sure - sure.detach()))
