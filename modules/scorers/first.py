"""First scorer: keeps the first tokens of a row, for mergers whose outputs have an order."""

from __future__ import annotations

from ..site import SiteInput
from .base import Scored, Scorer


class FirstScorer(Scorer):
    """Scores that fall from the first token of a row to the last: for every k, the k tokens that stay are among those of a larger k.

    In packed rows each document has its own count, so that its first tokens stay.
    """

    def forward(self, inputs: SiteInput) -> Scored:
        return Scored(-(inputs.state.position + inputs.flow.seen).float())
