"""Drop: tokens that are left out are gone."""

from __future__ import annotations

from torch import Tensor

from ..state import Decision, TokenState
from .base import Merged, Merger, gather_tokens


class DropMerger(Merger):
    """Prunes: X' = X without the tokens that were left out. They are gathered away, in training too, never masked."""

    conserves_size = False

    def forward(self, hidden_states: Tensor, scores: Tensor, decision: Decision, state: TokenState) -> Merged:
        return Merged(gather_tokens(hidden_states, decision.index), state.select(decision.index, decision.valid))
