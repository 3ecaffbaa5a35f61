"""Soft top-k estimator: a mask between 0 and 1 that adds up to the number of kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator

# Halvings of the interval that the shift is in: more than the bits of a float32.
_HALVINGS = 40


class SoftTopKEstimator(Estimator):
    """In training the kept tokens are multiplied by sigmoid(s + t), where t makes the mask add up to their number, and a binary
    cross-entropy pulls the mask to the hard decision (the differentiable top-k of VisionSelector, arXiv 2510.16598).

    The paper multiplies all tokens by the mask and removes none in training. Here the other tokens are removed; their scores get a gradient
    through t, since what one token gains the others lose. In evaluation tokens are not multiplied. As the cross-entropy's weight rises, the
    mask comes close to 0 and 1, and training to evaluation.

    Args:
        start: weight of the cross-entropy at the first step.
        end: its weight at the last step.
    """

    def __init__(self, start: float = 0.1, end: float = 2.0) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end)):
            if not value >= 0:
                raise ValueError(f"estimator 'soft_top_k': {name} = {value} must be at least 0")
        self.start, self.end = start, end

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        routable = inputs.state.routable
        kept = decision.kept_mask(inputs.state.tokens) & routable
        logits = scored.scores + shift(scored.scores, routable, kept.sum(-1, keepdim=True))
        # A row that keeps every token has nothing to decide.
        decided = routable & (kept.sum(-1, keepdim=True) < routable.sum(-1, keepdim=True))
        wrong = functional.binary_cross_entropy_with_logits(logits, kept.to(logits.dtype), reduction="none") * decided
        loss = wrong.sum() / decided.sum().clamp(min=1)
        weight = self.start + (self.end - self.start) * inputs.trace.progress
        return Estimate(scale=torch.where(decided, logits.sigmoid(), 1.0), loss=weight * loss)


def shift(scores: Tensor, routable: Tensor, count: Tensor) -> Tensor:
    """(B, 1) t with sum of sigmoid(scores + t) over the routable tokens = count, with the gradient of t as a function of the scores.

    Args:
        scores: (B, M) float32.
        routable: (B, M) bool.
        count: (B, 1) int64, from 1 to one less than the routable tokens; other counts give a finite t without meaning.
    """
    with torch.no_grad():
        share = (count / routable.sum(-1, keepdim=True).clamp(min=1)).clamp(1e-4, 1 - 1e-4)
        middle = share.logit()
        # With the lowest t every token is at most as likely as the mean, with the highest at least.
        low = middle - scores.masked_fill(~routable, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        high = middle - scores.masked_fill(~routable, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
        for _ in range(_HALVINGS):
            at = (low + high) / 2
            above = ((scores + at).sigmoid() * routable).sum(-1, keepdim=True) > count
            low, high = torch.where(above, low, at), torch.where(above, at, high)
        found = (low + high) / 2
        soft = (scores + found).sigmoid()
        slope = (soft * (1 - soft) * routable).sum(-1, keepdim=True).clamp(min=1e-6)
    # One step of Newton: its value is 0 at the solution, its gradient is that of the implicit function.
    return found - (((scores + found).sigmoid() * routable).sum(-1, keepdim=True) - count) / slope
