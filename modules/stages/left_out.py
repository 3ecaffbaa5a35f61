"""Parts of a stage with ``keep = 0``: no token is scored, and none of those in its scope is processed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scorers.base import Scored, Scorer
from ..selectors.base import Request, Selector, everything
from ..site import SiteInput
from ..tokens.decision import Decision
from ..tokens.state import TokenState


class NoScores(Scorer):
    """Gives every token the score 0."""

    def forward(self, inputs: SiteInput) -> Scored:
        return Scored(torch.zeros(inputs.state.position.shape, device=inputs.hidden_states.device))


class NoTokens(Selector):
    """Keeps no routable token; all of them where the trace requests a keep above 0, as for a dense teacher."""

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep > 0:
            return everything(state)
        return self.decide(torch.zeros_like(state.protected), scores, state)


def no_decision(state: TokenState) -> Decision:
    """The Decision of a layer that processes no token at all."""
    return Decision(state.position[:, :0], None, empty=True)
