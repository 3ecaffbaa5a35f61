"""What every merger shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from ..tokens.gather import sum_into, take
from ..tokens.state import TokenState


@dataclass(frozen=True)
class Merged:
    """Tokens after a stage.

    Attributes:
        hidden_states: (B, K, C).
        state: where they came from.
    """

    hidden_states: Tensor
    state: TokenState


class Merger(nn.Module):
    """P, the strategy: what becomes of the tokens that the decision leaves out.

    Args:
        spec: the tokens that it merges.

    Attributes:
        extra: routable tokens that the merger adds to a row from which something was left out; they count as kept.
        conserves_size: the sizes of all tokens add up to the source tokens, before and after.
        needs_partner: it merges into the partners that a matching scorer found.
        causal: a token that leaves holds nothing of those that stood behind its place.
        drops: what is left out is gone, not merged.
    """

    extra: ClassVar[int] = 0
    conserves_size: ClassVar[bool] = True
    needs_partner: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    drops: ClassVar[bool] = False

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()

    @property
    def reads_keys(self) -> bool:
        """It needs the keys that the site's layer makes of the tokens."""
        return False

    @property
    def outputs(self) -> int | None:
        """Routable tokens that it always makes, whatever the decision; None for a merger that follows the decision."""
        return None

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        """
        Args:
            inputs: the tokens at the site and where they came from.
            scored: what the scorer found.
            decision: which of them stay.
        """
        raise NotImplementedError

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        """MACs for one row that goes from ``tokens`` to ``kept`` tokens, protected ones included."""
        return 0


def merge_into(inputs: SiteInput, decision: Decision, partner: Tensor, proportional: bool) -> Merged:
    """Every token that the decision leaves out becomes part of its partner: their mean, weighted by size.

    Args:
        inputs: the tokens at the site.
        decision: which of them stay.
        partner: (B, M) int64, slot of a token that stays for each that does not.
        proportional: later layers attend to a token in proportion to its size.
    """
    hidden_states, state = inputs.hidden_states, replace(inputs.state, proportional=inputs.state.proportional or proportional)
    if decision.keeps_all(state):
        return Merged(hidden_states, state)
    slots = torch.arange(state.tokens, device=partner.device).expand_as(partner)
    goes = state.routable & ~decision.kept_mask(state.tokens)
    into = torch.where(goes, partner, slots)
    merged = state.absorb(into)
    # In float32: a token may take up many others.
    weighted = hidden_states.float() * state.size.unsqueeze(-1)
    mean = (sum_into(weighted, into) / merged.size.clamp(min=1e-6).unsqueeze(-1)).to(hidden_states.dtype)
    # What took nothing up is left as it is, to the last bit.
    grown = (merged.size != state.size).unsqueeze(-1)
    return Merged(take(torch.where(grown, mean, hidden_states), decision.index), merged.select(decision.index, decision.valid))
