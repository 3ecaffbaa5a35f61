"""Diversity scorer: tokens that are far from each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..cost.shape import StackShape
from ..tokens.state import TokenState
from .base import ComparingScorer


class DiversityScorer(ComparingScorer):
    """Order in which a greedy search for the largest smallest distance takes the tokens (DivPrune, arXiv 2503.02175).

    The distance of two tokens is 1 less the cosine of their hidden states. The first token is the one whose nearest other token is farthest;
    each next one is farthest from those that were taken. Scores are 0, -1, -2 … in this order, so that any count keeps a solution of the
    search. It is not trained, and takes one step a token.
    """

    @torch.no_grad()
    def compare(self, hidden_states: Tensor, state: TokenState) -> Tensor:
        routable, features = state.routable, functional.normalize(hidden_states.float(), dim=-1)
        rows, tokens = routable.shape
        distance = 1 - features @ features.transpose(1, 2)
        own = torch.eye(tokens, dtype=torch.bool, device=distance.device)
        nearest = distance.masked_fill(own | ~routable[:, None], torch.inf).amin(-1).masked_fill(~routable, -torch.inf)
        scores = torch.zeros(rows, tokens, device=distance.device)
        for step in range(tokens):
            taken = nearest.argmax(-1, keepdim=True)
            # A row without a token left takes none.
            left = nearest.gather(1, taken) > -torch.inf
            scores.scatter_(1, taken, torch.where(left, -float(step), scores.gather(1, taken)))
            if step == 0:
                nearest = torch.full_like(nearest, torch.inf).masked_fill(~routable, -torch.inf)
            to_taken = distance.gather(1, taken.unsqueeze(-1).expand(-1, -1, tokens)).squeeze(1)
            nearest = torch.minimum(nearest, to_taken).scatter(1, taken, -torch.inf)
        return scores

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens**2 * shape.hidden
