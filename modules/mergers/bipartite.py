"""Bipartite merger: merges every removed token into the partner that the scorer found."""

from __future__ import annotations

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from .base import Merged, Merger, merge_into


class BipartiteMerger(Merger):
    """Merges pairs into their mean, weighted by size (ToMe, arXiv 2210.09461). Needs scorer ``bipartite``.

    Args:
        spec: the tokens to merge.
        proportional: in later layers, log(size) is added to the attention logits of each key.
    """

    needs_partner = True

    def __init__(self, spec: TokenSpec, proportional: bool = True) -> None:
        super().__init__(spec)
        self.proportional = proportional

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        assert scored.partner is not None
        return merge_into(inputs, decision, scored.partner, self.proportional)

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        return (tokens - kept) * shape.hidden
