"""Density-peaks scorer: tokens amid others like them, far from any that has more."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.state import TokenState
from .base import ComparingScorer

# Distance in place of 0, whose logarithm is infinite.
_SMALLEST = 1e-20


class DensityPeaksScorer(ComparingScorer):
    """log(density · distance): centres of clusters first (DPC-KNN, as in TCFormer, arXiv 2204.08680, and Chat-UniVi, arXiv 2311.08046).

    The density of a token is exp(-mean squared distance to its k nearest tokens). Its distance is that to the nearest token of higher density;
    for the densest, that to the farthest. Distances of hidden states are divided by √C. Of equally dense tokens the first counts as denser.
    With merger ``nearest`` each kept token becomes the mean of its surroundings; ``squeeze`` forms clusters by similarity. It is not trained.
    Time and memory are quadratic: (B, M, M) float32 distances.

    Args:
        spec: the tokens to score.
        k: number of nearest tokens; at least 1. Rows with fewer others have all of them.
    """

    def __init__(self, spec: TokenSpec, k: int = 5) -> None:
        super().__init__(spec)
        if k < 1:
            raise ValueError(f"scorer 'density_peaks': k = {k} must be at least 1")
        self.k = k

    @torch.no_grad()
    def compare(self, hidden_states: Tensor, state: TokenState) -> Tensor:
        hidden_states = hidden_states.float()
        # The others that count for each token.
        others = state.routable[:, None] & ~torch.eye(state.tokens, dtype=torch.bool, device=hidden_states.device)
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
        return density + square.clamp(min=_SMALLEST).log() / 2

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens**2 * shape.hidden


def _squared_distances(values: Tensor) -> Tensor:
    """(B, M, C) -> (B, M, M)."""
    square = values.square().sum(-1)
    return (square[:, :, None] + square[:, None] - 2 * values @ values.transpose(1, 2)).clamp(min=0)
