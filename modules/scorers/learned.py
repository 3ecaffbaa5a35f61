"""A small trained network that scores every token from itself and from the mean of its row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..counting import BackboneShape
from .base import Scored, Scorer, ScorerInput


class LearnedScorer(Scorer):
    """Per-token MLP with a local and a global half (the predictor of DynamicViT, arXiv 2106.02034), logits in float32.

    Args:
        hidden_size: width C of the tokens.
        width: width of each half; None takes C // 4, at least 16.
        detach: cut the gradient from the scorer into the backbone below it.
    """

    trained = True
    lookahead = True

    def __init__(self, hidden_size: int, width: int | None = None, detach: bool = False) -> None:
        super().__init__(hidden_size)
        if width is not None and width < 1:
            raise ValueError(f"scorer 'learned': width = {width} must be at least 1")
        self.width = width or max(16, hidden_size // 4)
        self.features = 2 * self.width
        self.detach = detach
        self.norm = nn.LayerNorm(hidden_size)
        self.local_global = nn.Linear(hidden_size, 2 * self.width)
        self.mix = nn.Linear(2 * self.width, self.width)
        self.score = nn.Linear(self.width, 1)

    def forward(self, inputs: ScorerInput) -> Scored:
        tokens = inputs.hidden_states.detach() if self.detach else inputs.hidden_states
        features = functional.gelu(self.local_global(self.norm(tokens)))
        local, everywhere = features.chunk(2, dim=-1)
        routable = inputs.state.routable.unsqueeze(-1)
        mean = (everywhere * routable).sum(1, keepdim=True) / routable.sum(1, keepdim=True).clamp(min=1)
        mixed = functional.gelu(self.mix(torch.cat([local, mean.expand_as(local).to(local.dtype)], dim=-1)))
        # Scores are compared with each other, and bf16 cannot tell neighbours apart.
        with torch.autocast(mixed.device.type, enabled=False):
            scores = functional.linear(mixed.float(), self.score.weight.float(), self.score.bias.float()).squeeze(-1)
        return Scored(scores, features)

    def macs(self, shape: BackboneShape, tokens: int) -> int:
        return tokens * (shape.hidden * 2 * self.width + 2 * self.width**2 + self.width)
