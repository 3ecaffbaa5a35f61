"""Update scorer: predicts how much the site's layer would change a token, relative to the token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..precision import Float32Linear
from ..site import SiteInput, TokenSpec
from ..tokens.fitting import RIDGES, learn_choose_check
from ..tokens.trace import Update
from .base import Scored
from .linear import LinearScorer

# Steps, tokens a step and learning rate of Adam for the hidden layer.
_STEPS, _TOKENS, _RATE = 200, 512, 3e-3


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
        hidden: width of a hidden layer beside the linear map, for updates that are no linear function of the token; 0 has none. ``fit``
            keeps it only where it predicts other tokens better.
    """

    fits_updates = True

    def __init__(self, spec: TokenSpec, detach: bool = True, bias: float = 0.0, weight: float = 0.0, hidden: int = 0) -> None:
        super().__init__(spec, detach, bias)
        if weight < 0:
            raise ValueError(f"scorer 'update': weight = {weight} must be at least 0")
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 0:
            raise ValueError(f"scorer 'update': hidden = {hidden!r} must be an integer of at least 0")
        self.weight, self.hidden = weight, hidden
        if hidden:
            self.wide = nn.Linear(spec.hidden_size, hidden)
            self.narrow = Float32Linear(hidden, 1)
            nn.init.zeros_(self.narrow.weight)
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
        scores = super().forward(inputs).scores + self.length.float().clone() * _length(tokens)
        if self.hidden:
            scores = scores + self.narrow(functional.gelu(self.wide(self.norm(tokens)))).squeeze(-1)
        return Scored(scores)

    def update_loss(self, scores: Tensor, update: Update) -> Tensor:
        mean, deviation, _ = self.target.float()
        error = (scores - (_logarithm(update.size) - mean) / deviation).square()
        real = update.real.float()
        loss: Tensor = self.weight * (error * real).sum() / real.sum().clamp(min=1)
        return loss

    @torch.no_grad()
    def fit(self, tokens: Tensor, sizes: Tensor) -> float:
        """Ridge regression on three fifths of the tokens, and a few steps of Adam for the hidden layer on what is left; a fifth chooses.

        Args:
            tokens: (P, C) tokens before the layer.
            sizes: (P,) relative size of its update.

        Returns:
            Spearman's rank correlation of scores and sizes over the last fifth.
        """
        normed = self.norm(tokens.float())
        x = torch.cat([normed, _length(tokens)[:, None]], 1).double()
        y = _logarithm(sizes).double()
        mean, deviation = y.mean(), y.std().clamp(min=1e-6)
        first, choosing, last = learn_choose_check(len(y), y.device)
        center, target = x[first].mean(0), (y - mean) / deviation
        x = x - center
        errors = []
        for ridge in RIDGES:
            weights = _ridge(x[first], target[first] - target[first].mean(), ridge)
            errors.append((float(functional.mse_loss(x[choosing] @ weights, target[choosing])), weights))
        weights = min(errors, key=lambda pair: pair[0])[1]
        self.score.weight.copy_(weights[None, :-1])
        self.length.copy_(weights[-1:])
        self.score.bias.copy_((target[first].mean() - center @ weights)[None])
        self.target.copy_(torch.stack([mean, deviation, torch.ones_like(mean)]))
        predicted = x @ weights
        if self.hidden:
            predicted = predicted + self._fit_hidden(normed, (target - target[first].mean() - predicted).float(), first, choosing)
        return rank_correlation(predicted[last], y[last])

    def _fit_hidden(self, x: Tensor, left: Tensor, first: Tensor, choosing: Tensor) -> Tensor:
        """Fits the hidden layer to what the linear map leaves of the targets; its output for all tokens.

        Args:
            x: (P, C) normalised tokens.
            left: (P,) errors of the linear map.
            first: (P,) bool, tokens that are learned.
            choosing: (P,) bool, tokens on which the layer must have a smaller error than without it.
        """
        own = (self.wide.weight, self.wide.bias, self.narrow.weight, self.narrow.bias)

        def output(tokens: Tensor, wide: Tensor, wide_bias: Tensor, narrow: Tensor, narrow_bias: Tensor) -> Tensor:
            return functional.linear(functional.gelu(functional.linear(tokens, wide, wide_bias)), narrow, narrow_bias).squeeze(-1)

        with torch.enable_grad():
            weights = [parameter.detach().float().clone().requires_grad_() for parameter in own]
            learned, error = x[first], left[first]
            optimizer = torch.optim.Adam(weights, _RATE)
            strides = max(1, len(learned) // _TOKENS)
            for step in range(_STEPS):
                # Without a random number: every stride-th token, from another one each time.
                loss = functional.mse_loss(output(learned[step % strides :: strides], *weights), error[step % strides :: strides])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        found = output(x, *(weight.detach() for weight in weights))
        if functional.mse_loss(found[choosing], left[choosing]) >= left[choosing].square().mean():
            self.narrow.weight.zero_()
            self.narrow.bias.zero_()
            return torch.zeros_like(left)
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
        return found

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (shape.hidden + 1 + self.hidden * (shape.hidden + 1))


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
