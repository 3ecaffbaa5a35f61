"""Prefix: top-k of the prompt; what is generated is never reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Request, everything
from .top_k import TopKSelector


class PrefixSelector(TopKSelector):
    """Keeps the highest scores among the prompt's tokens, and every other token.

    It looks ahead, but within the prompt alone, which is there as a whole before the first token is generated. So ``keep`` is of
    the prompt's tokens, those that a trace's ``prompt`` tells; the last one, from which the first new token is predicted, stays.
    """

    prompt_only = True

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep >= 1 or int(state.routable.sum()) <= int(torch.as_tensor(request.count).sum()):
            return everything(state)
        return super().forward(scores, state, request)
