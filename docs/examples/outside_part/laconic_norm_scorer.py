"""A scorer of another package: the length of a token, as the layer that follows sees it."""

from __future__ import annotations

from laconic.modules.cost.shape import StackShape
from laconic.modules.scorers.base import Scored, Scorer
from laconic.modules.site import SiteInput, TokenSpec


class NormScorer(Scorer):
    """‖x_t‖₂ of every token, or its negative: an untrained criterion that needs no other token, so that causal models can deploy it.

    Args:
        spec: the tokens that it scores.
        largest: keep the longest tokens; if not, the shortest.
    """

    def __init__(self, spec: TokenSpec, largest: bool = True) -> None:
        super().__init__(spec)
        self.sign = 1.0 if largest else -1.0

    def forward(self, inputs: SiteInput) -> Scored:
        return Scored(self.sign * inputs.hidden_states.detach().float().norm(dim=-1))

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * shape.hidden
