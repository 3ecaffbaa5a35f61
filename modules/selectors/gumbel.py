"""Gumbel selector: keeps every token with its own probability, with noise that is annealed to 0."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Request, Selector, everything


class GumbelSelector(Selector):
    """Keeps a token if its score plus logistic noise is above 0: a hard Gumbel softmax over keep and drop (arXiv 1611.01144).

    At noise 1 a token is kept with probability sigmoid(score). The budget's schedule anneals the noise to 0, and evaluation uses none.
    The budget's controller holds the ratio.
    """

    adaptive = True
    needs_probabilities = True
    cuts = True
    # It keeps what its router learned, whatever is requested.
    one_keep = True
    explores = True

    @torch.no_grad()
    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep >= 1:
            return everything(state)
        if request.draws is not None:
            # The difference of two Gumbel draws is a logistic draw.
            scores = scores + torch.logit(request.draws) * request.noise
        return replace(self.decide(scores > 0, scores, state), cut=torch.zeros_like(scores[0, 0]))
