"""Top-k selector: keeps exactly the requested number of tokens, those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens.decision import Decision
from ..tokens.draws import gumbel
from ..tokens.gather import compact
from ..tokens.state import TokenState
from .base import Request, Selector


class TopKSelector(Selector):
    """Keeps the ``count`` highest scores of each row, ties to the lower slot, and every protected token.

    In training, scores are standardised over their row and Gumbel noise is added, which the schedule anneals to 0: at first any token
    may be kept, so that the router is trained on all of them; at the end the decisions are those of evaluation. In packed rows every
    document has its own count, as if it were alone.
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
        if state.document is not None:
            return self._of_documents(rank, state, state.document, torch.as_tensor(count))
        if state.counts is not None and isinstance(count, int):
            # A stable sort, not topk, whose choice among equal scores depends on the batch and the device.
            order = rank.sort(dim=-1, descending=True, stable=True).indices
            return Decision(order[:, : state.counts.protected + count].sort(-1).values, None)
        always = state.protected
        if state.valid is not None:
            rank, always = rank.masked_fill(~state.valid, float("-inf")), always & state.valid
        order = rank.sort(dim=-1, descending=True, stable=True).indices
        total = count + always.sum(-1)
        least, most = torch.stack(total.aminmax()).tolist()
        if self.causal and 0 < least == most:
            # Rows alike need no padding, and causal attention no mask.
            return Decision(order[:, :most].sort(-1).values, None)
        place = torch.arange(state.tokens, device=rank.device).expand_as(order)
        kept = compact(torch.zeros_like(always).scatter_(1, order, place < total[:, None]), most, self.bucket)
        return Decision(kept.index, kept.valid, self.causal and kept.empty)

    def _of_documents(self, rank: Tensor, state: TokenState, document: Tensor, count: Tensor) -> Decision:
        """Keeps the (B, D) ``count`` highest scores of each document."""
        if state.valid is not None:
            rank = rank.masked_fill(~state.valid, float("-inf"))
        by_score = rank.sort(dim=-1, descending=True, stable=True).indices
        # Sort by document, highest scores first within each; padding, which is in no document, comes last.
        last = document.gather(1, by_score).masked_fill(rank.gather(1, by_score) == float("-inf"), count.shape[1])
        order = by_score.gather(1, last.sort(dim=-1, stable=True).indices)
        owner = last.sort(dim=-1, stable=True).values
        place = torch.arange(state.tokens, device=rank.device).expand_as(owner)
        first = torch.full((state.rows, count.shape[1] + 1), state.tokens, device=rank.device).scatter_reduce_(1, owner, place, "amin")
        always = torch.zeros_like(count).scatter_add_(
            1, document, (state.protected if state.valid is None else state.protected & state.valid).long()
        )
        allowed = torch.nn.functional.pad(count + always, (0, 1)).gather(1, owner)
        stays = torch.zeros_like(owner, dtype=torch.bool).scatter_(1, order, place - first.gather(1, owner) < allowed)
        kept = compact(stays, bucket=self.bucket)
        return Decision(kept.index, kept.valid, self.causal and kept.empty)
