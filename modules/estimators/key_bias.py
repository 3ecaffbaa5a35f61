"""Key-bias estimator: straight-through bias on the attention logits of the kept tokens."""

from __future__ import annotations

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator


class KeyBiasEstimator(Estimator):
    """Adds s - sg(s) to the logits of each key in all later layers: the score's gradient is the effect of attending to its token.

    The value is 0. The gradient is that of softly removing the token, which ``straight_through`` cannot measure through a norm.
    The bias needs a gradient. Fused attention of some devices has no kernel for that, and torch uses its plain attention.
    """

    needs_attention = True

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        return Estimate(key_bias=scored.scores - scored.scores.detach())
