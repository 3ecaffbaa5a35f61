"""Pivot scorer: tokens that repeat the fewest of a few pivot tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.state import TokenState
from .base import ComparingScorer


class PivotsScorer(ComparingScorer):
    """Pivots first, then in turn the token that is least similar to each of them (DART, arXiv 2502.11494).

    Pivots are the tokens with the largest hidden states (the paper finds that it hardly matters which tokens are). Similarity is the cosine of
    hidden states. It is not trained.

    Args:
        spec: the tokens to score.
        pivots: number of pivots; at least 1.
    """

    def __init__(self, spec: TokenSpec, pivots: int = 8) -> None:
        super().__init__(spec)
        if pivots < 1:
            raise ValueError(f"pivots = {pivots} must be at least 1")
        self.pivots = pivots

    @torch.no_grad()
    def compare(self, hidden_states: Tensor, state: TokenState) -> Tensor:
        hidden_states, routable, tokens = hidden_states.float(), state.routable, state.tokens
        number = min(self.pivots, tokens)
        # A stable sort, whose choice among equal norms does not depend on the batch.
        norms = hidden_states.norm(dim=-1).masked_fill(~routable, -1)
        pivots = norms.sort(dim=-1, descending=True, stable=True).indices[:, :number]
        features = functional.normalize(hidden_states, dim=-1)
        chosen = features.gather(1, pivots.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        similarity = (chosen @ features.transpose(1, 2)).masked_fill(~routable[:, None], torch.inf)
        # Place of every token in the list of each pivot, least similar first; lists take turns.
        place = similarity.sort(dim=-1, stable=True).indices.argsort(dim=-1)
        turn = place * number + torch.arange(number, device=place.device)[:, None]
        scores = -turn.amin(1).float()
        # Where fewer tokens are kept than there are pivots, the largest of them.
        first = torch.arange(number, 0, -1, device=scores.device, dtype=scores.dtype).expand_as(pivots)
        return scores.scatter(1, pivots, first)

    def macs(self, shape: StackShape, tokens: Any) -> Any:
        # Rows of unequal length have a tensor of counts.
        pivots = tokens.clamp(max=self.pivots) if isinstance(tokens, Tensor) else min(self.pivots, tokens)
        return tokens * shape.hidden * (1 + pivots)
