"""Chunk-mean merger: each kept token becomes the mean of the chunk that it ends."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from .base import Merged, Merger, merge_into


class ChunkMeanMerger(Merger):
    """Mean, weighted by size, of a kept token and of the tokens since the previous kept one (dynamic pooling, arXiv 2211.09761).

    A chunk contains no token after its own position, and a restore by ``dechunk`` gives its output to that position and later ones.
    The tokens after the last kept token belong to a chunk that is still open. With a cache, their sum is carried in the cache;
    otherwise they are not represented in the layers that follow.

    Args:
        spec: the tokens to merge.
    """

    conserves_size = False
    causal = True

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__(spec)
        if not spec.causal:
            raise ValueError("merger 'chunk_mean' is for causal models, where a token may absorb only earlier tokens; take 'squeeze'")

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        state = inputs.state
        if decision.keeps_all(state):
            return Merged(inputs.hidden_states, state)
        # A protected token belongs to no chunk.
        kept = decision.kept_mask(state.tokens) & state.routable
        slots = torch.arange(state.tokens, device=kept.device).expand_as(kept)
        # First kept token at or after each token, which ends its chunk; the tokens after the last kept one have none.
        closing = torch.where(kept, slots, state.tokens).flip(1).cummin(1).values.flip(1)
        closed = closing < state.tokens
        closing = torch.where(closed, closing, slots)
        if state.document is not None:
            closing = torch.where(state.document.gather(1, closing) == state.document, closing, slots)
        merged = merge_into(inputs, decision, closing, proportional=False, alone=True)
        return merged if inputs.flow.carry is None else self._carried(inputs, inputs.flow.carry, merged, closed)

    @staticmethod
    def _carried(inputs: SiteInput, carry: dict[str, Tensor], merged: Merged, closed: Tensor) -> Merged:
        """Adds the open chunk of earlier forwards to the first chunk, and carries the chunk that is open now."""
        state, name = inputs.state, f"{inputs.stage}.open"
        pending = (state.size * (state.routable & ~closed)).unsqueeze(-1)
        total, size = (inputs.hidden_states.float() * pending).sum(1), pending.sum(1)
        hidden_states, after = merged.hidden_states, merged.state
        if name in carry:
            some = closed.any(-1, keepdim=True)
            earlier, weight = carry[name], carry[f"{name}.size"]
            total, size = total + earlier.masked_fill(some, 0.0), size + weight.masked_fill(some, 0.0)
            # Chunks are in order, but protected tokens may stand before the first.
            slot = after.routable.long().argmax(-1, keepdim=True)
            at = slot.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
            own, made = after.size.gather(1, slot), hidden_states.gather(1, at).squeeze(1)
            both = (own + weight).clamp(min=1e-6)
            first = torch.where(some & (weight > 0), ((made.float() * own + earlier) / both).to(made.dtype), made)
            hidden_states = hidden_states.scatter(1, at, first.unsqueeze(1))
            after = replace(after, size=after.size.scatter(1, slot, torch.where(some, both, own)))
        carry[name], carry[f"{name}.size"] = total, size
        return Merged(hidden_states, after)
