"""Uniform-grid scorer: keeps tokens at even distances over the image or sequence, independent of their content."""

from __future__ import annotations

import torch
from torch import Tensor

from ..site import SiteInput, TokenSpec
from .base import Scored, Scorer

# In a causal model, positions below 2^20 have different scores; float32 holds them exactly.
_CAUSAL_BITS = 20


def _reversed_bits(index: Tensor, bits: int) -> Tensor:
    """``index`` with its lowest ``bits`` bits in reverse order: the van der Corput sequence."""
    out = torch.zeros_like(index)
    for bit in range(bits):
        out = out | (((index >> bit) & 1) << (bits - 1 - bit))
    return out


class UniformGridScorer(Scorer):
    """Ordered-dither ranks (Bayer 1973): the top k tokens form an even grid for every k.

    With a patch grid the order is two-dimensional, and that of squares where a later layer joins them; otherwise it is the van der Corput
    order of the positions. In a causal model the score of a position lies in (0, 1] and does not depend on the row's length, so a threshold
    can decide token by token.
    """

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__(spec)
        self.causal, self.side = spec.causal, spec.side

    def forward(self, inputs: SiteInput) -> Scored:
        state, grid = inputs.state, inputs.flow.grid
        if self.causal:
            return Scored(1 - _reversed_bits(state.position + inputs.flow.seen, _CAUSAL_BITS).float() / 2**_CAUSAL_BITS)
        if grid is None:
            bits = max(1, (state.source.shape[1] - 1).bit_length())
            return Scored(-_reversed_bits(inputs.flow.cells(state).clamp(min=0), bits).float())
        bits = max(1, ((max(grid) - 1) // self.side).bit_length())
        row, column = inputs.flow.squares(state, self.side)
        rank = torch.zeros_like(row)
        for bit in range(bits):
            # A Bayer matrix interleaves the bits of (row xor column) and of row, in reverse order.
            pair = (((row ^ column) >> bit) & 1) << 1 | ((row >> bit) & 1)
            rank = rank | pair << (2 * (bits - 1 - bit))
        return Scored(-rank.float())
