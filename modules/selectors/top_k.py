"""Top-k: the highest scores stay, exactly as many as asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draws import gumbel
from ..state import Decision, TokenState
from .base import Request, Selector


class TopKSelector(Selector):
    """Keeps the ``count`` highest scores of each row, ties to the lower slot, and every protected token.

    In training, scores are standardised over their row and Gumbel noise is added, whose strength the schedule anneals to 0:
    first any token may stay, so that the router learns about all of them, at last exactly those of evaluation.
    """

    lookahead = True

    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        rank, count = scores.detach(), request.count
        if request.draws is not None:
            routable = state.routable
            number = routable.sum(-1, keepdim=True).clamp(min=1)
            mean = (rank * routable).sum(-1, keepdim=True) / number
            variance = ((rank - mean).square() * routable).sum(-1, keepdim=True) / number
            rank = rank / (variance.sqrt() + 1e-3) + gumbel(request.draws) * request.noise
        rank = rank.masked_fill(state.protected, float("inf"))
        if state.valid is None:
            assert isinstance(count, int)
            # A stable sort, not topk, whose choice among equal scores depends on the batch and the device.
            order = rank.sort(dim=-1, descending=True, stable=True).indices
            return Decision(order[:, : state.protected_per_row + count].sort(-1).values, None)
        rank = rank.masked_fill(~state.valid, float("-inf"))
        order = rank.sort(dim=-1, descending=True, stable=True).indices
        total = count + (state.protected & state.valid).sum(-1)
        width = int(total.max())
        valid = torch.arange(width, device=rank.device) < total[:, None]
        index = order[:, :width].masked_fill(~valid, state.tokens).sort(-1).values
        return Decision(index.clamp(max=state.tokens - 1), valid)
