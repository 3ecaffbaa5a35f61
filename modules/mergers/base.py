"""Merger: the base class of all mergers."""

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
from ..tokens.merging import merge_tokens
from ..tokens.state import TokenState


@dataclass(frozen=True)
class Merged:
    """Output of a merger.

    Attributes:
        hidden_states: (B, K, C) hidden states after the stage.
        state: TokenState of these tokens.
    """

    hidden_states: Tensor
    state: TokenState


class Merger(nn.Module):
    """P, the strategy: removes or merges the tokens that the decision does not keep.

    Args:
        spec: the tokens to merge.

    Attributes:
        extra: routable tokens that the merger adds to a row from which tokens were removed; they count as kept.
        conserves_size: the sum of the token sizes is the same before and after.
        needs_partner: the merger needs ``Scored.partner`` of a matching scorer.
        causal: a token after the merger depends on no later token.
        drops: removed tokens are dropped, not merged.
        proportional: in later layers, log(size) is added to the attention logits of each key.
    """

    extra: ClassVar[int] = 0
    conserves_size: ClassVar[bool] = True
    needs_partner: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    proportional: bool = False

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()

    @property
    def reads_keys(self) -> bool:
        """The merger reads the keys that the site's layer computes."""
        return False

    @property
    def outputs(self) -> int | None:
        """Number of routable tokens that the merger makes of any row; None if the decision sets the number."""
        return None

    @property
    def most(self) -> int | None:
        """Largest number of routable tokens that stay of a row from which tokens are removed; None if it is any."""
        return None

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        """
        Args:
            inputs: the tokens at the site and their state.
            scored: output of the scorer.
            decision: the tokens to keep.
        """
        raise NotImplementedError

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        """MACs for one row with ``tokens`` tokens before the merger and ``kept`` after it, protected tokens included."""
        return 0


def merge_into(inputs: SiteInput, decision: Decision, partner: Tensor, proportional: bool, alone: bool = False) -> Merged:
    """Merges every token that is not kept into its partner; the result is their mean, weighted by size.

    Args:
        inputs: the tokens at the site.
        decision: the tokens to keep.
        partner: (B, M) int64, for each token that is not kept, the slot of a kept token.
        proportional: in later layers, log(size) is added to the attention logits of each key.
        alone: a token that is not kept may be its own partner, and is in no mean then.
    """
    if decision.keeps_all(inputs.state):
        return keep_all(inputs, proportional)
    hidden_states, state = inputs.hidden_states, replace(inputs.state, proportional=inputs.state.proportional or proportional)
    if decision.valid is None and state.valid is None and not alone and not torch.compiler.is_exporting():
        return _merge_known(hidden_states, state, decision, partner)
    slots = torch.arange(state.tokens, device=partner.device).expand_as(partner)
    removed = state.routable & ~decision.kept_mask(state.tokens)
    into = torch.where(removed, partner, slots)
    merged = state.absorb(into)
    # In float32, because many tokens may be summed into one.
    weighted = hidden_states.float() * state.size.unsqueeze(-1)
    mean = (sum_into(weighted, into) / merged.size.clamp(min=1e-6).unsqueeze(-1)).to(hidden_states.dtype)
    # Tokens that absorbed no other token stay bit-equal.
    grown = (merged.size != state.size).unsqueeze(-1)
    return Merged(take(torch.where(grown, mean, hidden_states), decision.index), merged.select(decision.index, decision.valid))


def _merge_known(hidden_states: Tensor, state: TokenState, decision: Decision, partner: Tensor) -> Merged:
    """``merge_into`` where every row has the same numbers of tokens, before and after, and each that is not kept a partner."""
    kept = decision.index
    leaves = torch.ones_like(state.protected).scatter_(1, kept, False)
    # Slots of the tokens that leave, in order.
    gone = leaves.byte().sort(dim=-1, stable=True).indices[:, kept.shape[1] :]
    # Number among the kept tokens of the one that each token becomes a part of.
    place = (~leaves).cumsum(-1) - 1
    into = place.gather(1, partner.gather(1, gone))
    place = place.scatter(1, gone, into)
    merged, size = merge_tokens(hidden_states, state.size, kept, gone, into)
    after = state.select(kept, None)
    source = place.gather(1, state.source.clamp(min=0)).masked_fill(state.source < 0, -1)
    return Merged(merged, replace(after, size=size, source=source))


def keep_all(inputs: SiteInput, proportional: bool) -> Merged:
    """Every token as it is.

    Args:
        inputs: the tokens at the site.
        proportional: in later layers, log(size) is added to the attention logits of each key.
    """
    return Merged(inputs.hidden_states, replace(inputs.state, proportional=inputs.state.proportional or proportional))
