"""Fuse merger: merges all tokens that are not kept into one token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..site import SiteInput
from ..tokens.decision import Decision
from ..tokens.gather import take
from .base import Merged, Merger


class FuseMerger(Merger):
    """Fuses the tokens that are not kept into one: their mean, weighted by the softmax of the scores (after EViT, arXiv 2202.07800).

    The fused token is the last one of the row, counts as kept and is routable in later stages. Its weights are normalised scores, so
    the scorer gets a gradient from removed tokens too.
    """

    extra = 1

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        hidden_states, state, scores = inputs.hidden_states, inputs.state, scored.scores
        if decision.keeps_all(state):
            return Merged(hidden_states, state)
        kept = take(hidden_states, decision.index)
        kept_state = state.select(decision.index, decision.valid)
        left_out = state.routable & ~decision.kept_mask(state.tokens)
        some = left_out.any(-1, keepdim=True)
        # In a row with no removed token (shorter than the others), the fused slot is padding; the mask avoids NaN.
        logits = scores.masked_fill(~left_out, float("-inf")).masked_fill(~some, 0.0)
        weights = (logits + state.size.clamp(min=1e-6).log()).softmax(-1)
        # Multiply and sum, not a matrix product, whose rounding depends on the memory addresses of its inputs.
        fused = (weights.to(hidden_states.dtype).unsqueeze(-1) * hidden_states).sum(1, keepdim=True)
        slot = kept_state.tokens
        lowest = torch.where(left_out, state.position, state.source.shape[1] - 1).amin(-1, keepdim=True)
        current = state.source.clamp(min=0)
        absorbed = left_out.gather(1, current) & (state.source >= 0)
        valid, counts = kept_state.valid, kept_state.counts
        if valid is not None:
            valid = torch.cat([valid, some], 1)
        return Merged(
            torch.cat([kept, fused], 1),
            replace(
                kept_state,
                size=torch.cat([kept_state.size, (state.size * left_out).sum(-1, keepdim=True)], 1),
                source=kept_state.source.masked_fill(absorbed, slot),
                position=torch.cat([kept_state.position, lowest], 1),
                protected=torch.cat([kept_state.protected, torch.zeros_like(some)], 1),
                valid=valid,
                counts=None if counts is None else replace(counts, routable=counts.routable + 1),
                key_bias=None if kept_state.key_bias is None else functional.pad(kept_state.key_bias, (0, 1)),
            ),
        )

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        return (kept < tokens) * tokens * shape.hidden
