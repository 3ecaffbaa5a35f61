"""Random: as many tokens as asked for, whatever their scores."""

from __future__ import annotations

from torch import Tensor

from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Request
from .threshold import ThresholdSelector


class RandomSelector(ThresholdSelector):
    """Draws the tokens, so that a trained scorer's other work, the weights of ``gate``, can be told from its choice.

    The draws belong to (seed, step, sample id, position), as those of the ``random`` scorer; what is deployed cuts them token by token.
    """

    draws = True

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        assert request.draws is not None
        decision: Decision = super().forward(request.draws, state, request)
        return decision
