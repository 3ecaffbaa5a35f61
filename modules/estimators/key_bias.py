"""Straight-through bias on the attention logits of the tokens that stay."""

from __future__ import annotations

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class KeyBiasEstimator(Estimator):
    """Adds s - sg(s) to the logits of each key in all later layers: the score learns what attending to its token is worth.

    The value is 0, the gradient is that of softly leaving the token out, which ``straight_through`` cannot see behind a norm.
    The bias needs a gradient, for which some devices' fused attention has no kernel and torch takes its plain one.
    """

    needs_attention = True

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        return Estimate(key_bias=scored.scores - scored.scores.detach())
