"""Drop merger: removes the tokens that are not kept."""

from __future__ import annotations

from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from ..tokens.gather import take
from .base import Merged, Merger


class DropMerger(Merger):
    """Pruning: the tokens that are not kept are removed from the tensor, in training too, never masked."""

    conserves_size = False
    causal = True
    drops = True

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        if decision.keeps_all(inputs.state):
            return Merged(inputs.hidden_states, inputs.state)
        return Merged(take(inputs.hidden_states, decision.index), inputs.state.select(decision.index, decision.valid))
