"""Density-peaks scorer: tokens amid others like them, far from any that has more."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from .base import Scored, Scorer

# Distance in place of 0, whose logarithm is infinite.
_SMALLEST = 1e-20


class DensityPeaksScorer(Scorer):
    """log(density · distance): centres of clusters first (DPC-KNN, as in TCFormer, arXiv 2204.08680, and Chat-UniVi, arXiv 2311.08046).

    The density of a token is exp(-mean squared distance to its k nearest tokens). Its distance is that to the nearest token of higher density;
    for the densest, that to the farthest. Distances of hidden states are divided by √C. Of equally dense tokens the first counts as denser.
    With merger ``nearest`` each kept token becomes the mean of its surroundings; ``squeeze`` forms clusters by similarity. It is not trained.
    Time and memory are quadratic: (B, M, M) float32 distances.

    Args:
        spec: the tokens to score.
        k: number of nearest tokens; at least 1. Rows with fewer others have all of them.
    """

    lookahead = True

    def __init__(self, spec: TokenSpec, k: int = 5) -> None:
        super().__init__(spec)
        if k < 1:
            raise ValueError(f"scorer 'density_peaks': k = {k} must be at least 1")
        self.k = k

    @torch.no_grad()
    def forward(self, inputs: SiteInput) -> Scored:
        state, hidden_states = inputs.state, inputs.hidden_states.float()
        # The others that count for each token: routable ones of its row, or of its document.
        others = state.routable[:, None] & ~torch.eye(state.tokens, dtype=torch.bool, device=hidden_states.device)
        if state.document is not None:
            others = others & (state.document[:, :, None] == state.document[:, None])
        squares = _squared_distances(hidden_states) / hidden_states.shape[-1]
        near = squares.masked_fill(~others, torch.inf).sort(-1).values[..., : self.k]
        number = others.sum(-1).clamp(min=1, max=self.k)
        # The logarithm of a density, which the exponential of large distances would make 0.
        density = -near.masked_fill(near.isinf(), 0.0).sum(-1) / number
        earlier = torch.ones_like(others[0]).tril(-1)
        equal = density[:, None] == density[:, :, None]
        denser = others & ((density[:, None] > density[:, :, None]) | (equal & earlier))
        to_denser = squares.masked_fill(~denser, torch.inf).amin(-1)
        farthest = squares.masked_fill(~others, 0.0).amax(-1)
        square = torch.where(denser.any(-1), to_denser, farthest)
        return Scored(density + square.clamp(min=_SMALLEST).log() / 2)

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens**2 * shape.hidden


def _squared_distances(values: Tensor) -> Tensor:
    """(B, M, C) -> (B, M, M)."""
    square = values.square().sum(-1)
    return (square[:, :, None] + square[:, None] - 2 * values @ values.transpose(1, 2)).clamp(min=0)
