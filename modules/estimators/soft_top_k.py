"""Soft top-k estimator: a mask between 0 and 1 that adds up to the number of kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from .base import Estimate, Estimator, Temperature

# Halvings of the interval that the shift is in: more than the bits of a float32.
_HALVINGS = 40


class SoftTopKEstimator(Estimator):
    """A straight-through weight 1 + m - sg(m) on the tokens, with the mask m = sigmoid(s + t), where t makes m add up to the number of kept
    tokens; and a binary cross-entropy that pulls m to the hard decision (the differentiable top-k of VisionSelector, arXiv 2510.16598).

    Tokens that are not kept are removed in training too; their scores get a gradient through t, since what one token gains the others
    lose, and through a merger that makes them a part of kept ones. The value of the weight is 1, so that training and evaluation compute
    the same.

    The paper multiplies all tokens by m in training, removes none, and does neither in use. ``weighted`` multiplies by m too. As the
    cross-entropy's weight rises, m comes close to 0 and 1, and training to evaluation; until then the layers behind the stage learn on
    tokens that are weaker than in use. A merger would also average removed tokens with the weight m, where use has weight 1.

    Args:
        start: weight of the cross-entropy at the first step.
        end: its weight at the last step.
        weighted: the factor in training is m itself.
        temperature: τ at the first step, m = sigmoid(s ÷ τ + t): the lower it is, the harder the mask.
        final_temperature: τ at the last step; None keeps it.
    """

    def __init__(
        self,
        start: float = 0.1,
        end: float = 2.0,
        weighted: bool = False,
        temperature: float = 1.0,
        final_temperature: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end)):
            if not value >= 0:
                raise ValueError(f"estimator 'soft_top_k': {name} = {value} must be at least 0")
        if not isinstance(weighted, bool):
            raise ValueError(f"estimator 'soft_top_k': weighted = {weighted!r} must be true or false")
        self.start, self.end, self.weighted = start, end, weighted
        self.temperature = Temperature(temperature, final_temperature, "soft_top_k")

    @property
    def weighs_training(self) -> bool:
        return self.weighted

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
        routable = inputs.state.routable
        kept = decision.kept_mask(inputs.state.tokens) & routable
        scores = scored.scores / self.temperature.at(inputs.trace.progress)
        logits = scores + shift(scores, routable, kept.sum(-1, keepdim=True))
        # A row that keeps every token has nothing to decide.
        decided = routable & (kept.sum(-1, keepdim=True) < routable.sum(-1, keepdim=True))
        wrong = functional.binary_cross_entropy_with_logits(logits, kept.to(logits.dtype), reduction="none") * decided
        loss = wrong.sum() / decided.sum().clamp(min=1)
        weight = self.start + (self.end - self.start) * inputs.trace.progress
        mask = logits.sigmoid()
        scale = mask if self.weighted else 1 + (mask - mask.detach())
        return Estimate(scale=torch.where(decided, scale, 1.0), loss=weight * loss)


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
