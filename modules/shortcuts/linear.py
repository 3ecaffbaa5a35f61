"""Linear shortcut: a linear map of low rank, in place of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cost.shape import StackShape
from ..site import TokenSpec
from .base import Shortcut

# Strengths of the ridge regression that are tried, as shares of the mean square of the features.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


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
        super().__init__(spec)
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
        # No row is in two parts, but for those at their ends.
        part = torch.arange(len(x), device=x.device) * 5 // len(x)
        first, choosing, last = part < 3, part == 3, part == 4
        center, mean = x[first].mean(0), y[first].mean(0)
        x, y = x - center, y - mean
        values, vectors = torch.linalg.eigh(x[first].T @ x[first])
        turned = vectors.T @ (x[first].T @ y[first])
        found = []
        for ridge in _RIDGES:
            weights = self._of_rank(vectors @ (turned / (values + ridge * values.mean().clamp(min=1e-12))[:, None]), x[first])
            found.append((float((x[choosing] @ weights - y[choosing]).square().sum()), weights))
        best = min(found, key=lambda pair: pair[0])[1]
        left, scale, right = torch.linalg.svd(best, full_matrices=False)
        root = scale[: self.rank].sqrt()
        self.down.weight.copy_((left[:, : self.rank] * root).T)
        self.up.weight.copy_(right[: self.rank].T * root)
        self.up.bias.copy_(mean - center @ best)
        self.ready.fill_(1)
        missed = (x[last] @ best - y[last]).square().sum()
        return 1 - float(missed / (y[last] + mean).square().sum().clamp(min=1e-12))

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
