"""Learned scorer: a small trained network that reads each token and the mean of its row or document."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from ..cost.shape import StackShape
from ..precision import Float32Linear
from ..site import SiteInput, TokenSpec
from ..tokens.means import mean_of_routable
from .base import Scored, Scorer


class LearnedScorer(Scorer):
    """Per-token MLP with local and global features (the predictor of DynamicViT, arXiv 2106.02034), logits in float32.

    Args:
        spec: the tokens to score.
        width: width of the local and of the global features; None means C // 6, at least 16.
        detach: stop the gradient from the scorer into the backbone below it.
    """

    estimator = "straight_through"
    chunk_estimator = "confidence"
    probabilities = True
    lookahead = True

    def __init__(self, spec: TokenSpec, width: int | None = None, detach: bool = False) -> None:
        super().__init__(spec)
        if width is not None and width < 1:
            raise ValueError(f"scorer 'learned': width = {width} must be at least 1")
        self.width = width or max(16, spec.hidden_size // 6)
        self.detach = detach
        # Without weight and bias: the linear layer after it has them, and their backward is slower than the linear layer's.
        self.norm = nn.LayerNorm(spec.hidden_size, elementwise_affine=False)
        self.local_global = nn.Linear(spec.hidden_size, 2 * self.width)
        self.mix_local = nn.Linear(self.width, self.width)
        self.mix_global = nn.Linear(self.width, self.width, bias=False)
        self.score = Float32Linear(self.width, 1)

    def forward(self, inputs: SiteInput) -> Scored:
        tokens = inputs.hidden_states.detach() if self.detach else inputs.hidden_states
        local, everywhere = functional.gelu(self.local_global(self.norm(tokens))).chunk(2, dim=-1)
        mean = mean_of_routable(everywhere, inputs.state)
        # A linear layer over the concatenated local and global features, without repeating the mean for every token.
        mixed = functional.gelu(self.mix_local(local) + self.mix_global(mean))
        return Scored(self.score(mixed).squeeze(-1))

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * (shape.hidden * 2 * self.width + self.width**2 + self.width) + self.width**2
