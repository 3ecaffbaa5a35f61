"""Chunk mean: a token that stays becomes the mean of its chunk, which it closes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..scorers.base import Scored
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from .base import Merged, Merger, merge_into


class ChunkMeanMerger(Merger):
    """Mean, weighted by size, of a token that stays and of those since the last one that stayed (dynamic pooling, arXiv 2211.09761).

    So a chunk holds nothing that comes after its own place, and a restore by ``dechunk`` hands it to that place and those behind it.
    Tokens behind the last one that stays wait: their chunk is open still. With a cache their sum waits there; otherwise they
    are gone for the layers that follow.

    Args:
        spec: the tokens that it merges.
    """

    conserves_size = False
    causal = True

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__(spec)
        if not spec.causal:
            raise ValueError("merger 'chunk_mean' is for causal models, where a token may take up earlier ones only; take 'squeeze'")

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        state = inputs.state
        if decision.keeps_all(state):
            return Merged(inputs.hidden_states, state)
        # A protected token is in no chunk.
        kept = decision.kept_mask(state.tokens) & state.routable
        slots = torch.arange(state.tokens, device=kept.device).expand_as(kept)
        # The first one that stays at or behind each token; none closes the chunk of the last tokens.
        closing = torch.where(kept, slots, state.tokens).flip(1).cummin(1).values.flip(1)
        closed = closing < state.tokens
        closing = torch.where(closed, closing, slots)
        if state.document is not None:
            closing = torch.where(state.document.gather(1, closing) == state.document, closing, slots)
        merged = merge_into(inputs, decision, closing, proportional=False)
        return merged if inputs.flow.carry is None else self._carried(inputs, inputs.flow.carry, merged, closed)

    @staticmethod
    def _carried(inputs: SiteInput, carry: dict[str, Tensor], merged: Merged, closed: Tensor) -> Merged:
        """Gives the first chunk what earlier forwards left open, and leaves what is open now."""
        state, name = inputs.state, f"{inputs.stage}.open"
        waits = (state.size * (state.routable & ~closed)).unsqueeze(-1)
        total, size = (inputs.hidden_states.float() * waits).sum(1), waits.sum(1)
        hidden_states, after = merged.hidden_states, merged.state
        if name in carry:
            some = closed.any(-1, keepdim=True)
            earlier, weight = carry[name], carry[f"{name}.size"]
            total, size = total + earlier.masked_fill(some, 0.0), size + weight.masked_fill(some, 0.0)
            # Chunks are in order; protected tokens may stand in front of the first.
            slot = after.routable.long().argmax(-1, keepdim=True)
            at = slot.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
            own, made = after.size.gather(1, slot), hidden_states.gather(1, at).squeeze(1)
            both = (own + weight).clamp(min=1e-6)
            first = torch.where(some & (weight > 0), ((made.float() * own + earlier) / both).to(made.dtype), made)
            hidden_states = hidden_states.scatter(1, at, first.unsqueeze(1))
            after = replace(after, size=after.size.scatter(1, slot, torch.where(some, both, own)))
        carry[name], carry[f"{name}.size"] = total, size
        return Merged(hidden_states, after)
