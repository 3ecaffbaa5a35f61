"""Update scorer: predicts how much the site's layer would change a token, relative to the token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from ..tokens.trace import Update
from .base import Scored
from .linear import LinearScorer

# Strengths of the ridge regression that are tried, as shares of the mean square of the features.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


class UpdateScorer(LinearScorer):
    """Predicts log(‖f(x)‖ ÷ ‖x‖), standardised over tokens, from the normalised token and its length: what a layer would change least
    bypasses it.

    Before training ``fit`` sets the weights by ridge regression on tokens that the whole layer has processed; ``start_routers`` calls it,
    and so does ``laconic train``. A token is scored by itself, so causal models can use it in generation. Random until it is fitted.

    Args:
        spec: the tokens to score.
        detach: stop the gradient from the scorer into the backbone below it.
        bias: initial bias of the scores.
        weight: weight of an auxiliary loss, the mean squared error of the prediction for the tokens that the layer processes.
    """

    fits_updates = True

    def __init__(self, spec: TokenSpec, detach: bool = True, bias: float = 0.0, weight: float = 0.0) -> None:
        super().__init__(spec, detach, bias)
        if weight < 0:
            raise ValueError(f"scorer 'update': weight = {weight} must be at least 0")
        self.weight = weight
        # The residual stream grows along a row's layers and is long at a few tokens, which layers change little.
        self.length = nn.Parameter(torch.zeros(1))
        self.target: Tensor
        # Mean and standard deviation of the logarithms, and whether ``fit`` has run.
        self.register_buffer("target", torch.tensor([0.0, 1.0, 0.0]))

    @property
    def learns_updates(self) -> bool:
        return self.weight > 0

    @property
    def fitted(self) -> bool:
        """``fit`` has run."""
        return bool(self.target[2])

    def forward(self, inputs: SiteInput) -> Scored:
        tokens = inputs.hidden_states.detach() if self.detach else inputs.hidden_states
        return Scored(super().forward(inputs).scores + self.length.float().clone() * _length(tokens))

    def update_loss(self, scores: Tensor, update: Update) -> Tensor:
        mean, deviation, _ = self.target.float()
        error = (scores - (_logarithm(update.size) - mean) / deviation).square()
        real = update.real.float()
        loss: Tensor = self.weight * (error * real).sum() / real.sum().clamp(min=1)
        return loss

    @torch.no_grad()
    def fit(self, tokens: Tensor, sizes: Tensor) -> float:
        """Ridge regression on three fifths of the tokens; a fifth chooses its strength.

        Args:
            tokens: (P, C) tokens before the layer.
            sizes: (P,) relative size of its update.

        Returns:
            Spearman's rank correlation of scores and sizes over the last fifth.
        """
        x = torch.cat([self.norm(tokens.float()), _length(tokens)[:, None]], 1).double()
        y = _logarithm(sizes).double()
        mean, deviation = y.mean(), y.std().clamp(min=1e-6)
        # Neighbouring tokens of a row are in different parts.
        part = torch.arange(len(y), device=y.device) % 5
        first, choosing, last = part < 3, part == 3, part == 4
        center, target = x[first].mean(0), (y - mean) / deviation
        x = x - center
        errors = []
        for ridge in _RIDGES:
            weights = _ridge(x[first], target[first] - target[first].mean(), ridge)
            errors.append((float(functional.mse_loss(x[choosing] @ weights, target[choosing])), weights))
        weights = min(errors, key=lambda pair: pair[0])[1]
        self.score.weight.copy_(weights[None, :-1])
        self.length.copy_(weights[-1:])
        self.score.bias.copy_((target[first].mean() - center @ weights)[None])
        self.target.copy_(torch.stack([mean, deviation, torch.ones_like(mean)]))
        return rank_correlation(x[last] @ weights, y[last])

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (shape.hidden + 1)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two (P,) tensors; 0 where one of them does not vary."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    found = float(torch.corrcoef(ranks)[0, 1])
    return found if found == found else 0.0


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(F,) weights from (P, F) centred features and (P,) targets, by the smaller of the two systems."""
    strength = ridge * x.square().sum(1).mean()
    if x.shape[0] < x.shape[1]:
        gram = x @ x.T + strength * torch.eye(len(x), dtype=x.dtype, device=x.device)
        dual: Tensor = torch.linalg.solve(gram, y)
        return x.T @ dual
    gram = x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights: Tensor = torch.linalg.solve(gram, x.T @ y)
    return weights


def _length(tokens: Tensor) -> Tensor:
    """(…,) float32 logarithm of the length of (…, C) tokens."""
    lengths: Tensor = tokens.float().norm(dim=-1)
    return lengths.clamp(min=1e-6).log()


def _logarithm(sizes: Tensor) -> Tensor:
    return sizes.float().clamp(min=1e-6).log()
