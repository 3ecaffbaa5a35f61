"""Random selector: keeps the requested number of tokens at random, independent of their scores."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Request
from .threshold import ThresholdSelector


class RandomSelector(ThresholdSelector):
    """Selects at random, as a control: it separates the effect of ``gate``'s weights from the effect of a trained selection.

    The draws are a function of (seed, step, sample id, position), like those of the ``random`` scorer; evaluation compares each draw with
    a threshold, token by token.
    """

    draws = True
    by_scores = False
    ignores_noise = True

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        assert request.draws is not None
        decision: Decision = super().forward(request.draws, state, replace(request, draws=None))
        return decision
