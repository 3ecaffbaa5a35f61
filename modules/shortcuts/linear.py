"""Linear shortcut: a linear map of low rank, in place of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.fitting import RIDGES, learn_choose_check
from .base import Shortcut


class LinearShortcut(Shortcut):
    """Adds ‖x‖ · (U · V · x/‖x‖ + b), with V of (rank, C) and U of (C, rank), ‖x‖ the root mean square of a token.

    Linear maps in place of layers are of arXiv 2303.09435 and 2505.02819; here also for the tokens alone that bypass a layer. ``fit`` sets U, V and
    b by ridge regression of the layer's updates, relative to the tokens, and keeps the directions in which the prediction is largest (regression
    of reduced rank). Until then it adds nothing.

    Args:
        spec: the tokens.
        rank: rank of the map; None takes an eighth of the hidden size.
    """

    def __init__(self, spec: TokenSpec, rank: int | None = None) -> None:
        super().__init__()
        width = spec.hidden_size
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= width):
            raise ValueError(f"shortcut 'linear': rank = {rank!r} must be an integer from 1 to {width}, the hidden size")
        self.rank = max(1, width // 8) if rank is None else rank
        self.down = nn.Linear(width, self.rank, bias=False)
        self.up = nn.Linear(self.rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.ready: Tensor
        self.register_buffer("ready", torch.zeros(()))

    @property
    def fitted(self) -> bool:
        return bool(self.ready)

    def forward(self, hidden_states: Tensor) -> Tensor:
        length = _length(hidden_states)
        added: Tensor = self.up(self.down((hidden_states.float() / length).to(hidden_states.dtype))) * length.to(hidden_states.dtype)
        return added

    @torch.no_grad()
    def fit(self, tokens: Tensor, updates: Tensor) -> float:
        length = _length(tokens)
        x, y = (tokens.float() / length).double(), (updates.float() / length).double()
        if not len(x):
            return 0.0
        first, choosing, last = learn_choose_check(len(x), x.device)
        found = [(maps, _missed(maps, x[choosing], y[choosing])) for maps in self._maps(x[first], y[first])]
        best = min(range(len(found)), key=lambda number: found[number][1])
        share = 1 - _missed(found[best][0], x[last], y[last]) / max(float(y[last].square().sum()), 1e-12)
        weights, bias = self._maps(x, y)[best]
        left, scale, right = torch.linalg.svd(weights, full_matrices=False)
        root = scale[: self.rank].sqrt()
        self.down.weight.copy_((left[:, : self.rank] * root).T)
        self.up.weight.copy_(right[: self.rank].T * root)
        self.up.bias.copy_(bias)
        self.ready.fill_(1)
        return share

    def _maps(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(C, C) weights of the rank and (C,) bias from (P, C) tokens to (P, C) updates, for each strength of the regression."""
        center, mean = x.mean(0), y.mean(0)
        x, y = x - center, y - mean
        values, vectors = torch.linalg.eigh(x.T @ x)
        turned = vectors.T @ (x.T @ y)
        maps = []
        for ridge in RIDGES:
            weights = self._of_rank(vectors @ (turned / (values + ridge * values.mean().clamp(min=1e-12))[:, None]), x)
            maps.append((weights, mean - center @ weights))
        return maps

    def _of_rank(self, weights: Tensor, x: Tensor) -> Tensor:
        """(C, C) weights with a prediction of the rank, nearest to theirs."""
        if self.rank >= len(weights):
            return weights
        predicted = x @ weights
        directions = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -self.rank :]
        reduced: Tensor = weights @ directions @ directions.T
        return reduced

    def macs(self, shape: StackShape, tokens: int) -> int:
        return 2 * tokens * shape.hidden * self.rank


def _length(tokens: Tensor) -> Tensor:
    """(..., C) -> (..., 1) float32, root mean square of the tokens, with its gradient."""
    return tokens.float().square().mean(-1, keepdim=True).add(1e-12).sqrt()


def _missed(maps: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    """Sum of the squares of (P, C) updates that weights and bias do not predict from (P, C) tokens."""
    weights, bias = maps
    return float((x @ weights + bias - y).square().sum())
