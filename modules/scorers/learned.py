"""A small trained network that scores every token from itself and from the mean of its row."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from ..counting import BackboneShape
from ..linear import Float32Linear
from .base import Scored, Scorer, SiteInput, TokenSpec


class LearnedScorer(Scorer):
    """Per-token MLP with a local and a global half (the predictor of DynamicViT, arXiv 2106.02034), logits in float32.

    Args:
        spec: the tokens that it scores.
        width: width of each half; None takes C // 6, at least 16.
        detach: cut the gradient from the scorer into the backbone below it.
    """

    estimator = "straight_through"
    probabilities = True
    lookahead = True

    def __init__(self, spec: TokenSpec, width: int | None = None, detach: bool = False) -> None:
        super().__init__(spec)
        if width is not None and width < 1:
            raise ValueError(f"scorer 'learned': width = {width} must be at least 1")
        self.width = width or max(16, spec.hidden_size // 6)
        self.detach = detach
        # No weight and bias: the linear layer that follows has them, and their backward costs more than the layer's own.
        self.norm = nn.LayerNorm(spec.hidden_size, elementwise_affine=False)
        self.local_global = nn.Linear(spec.hidden_size, 2 * self.width)
        self.mix_local = nn.Linear(self.width, self.width)
        self.mix_global = nn.Linear(self.width, self.width, bias=False)
        self.score = Float32Linear(self.width, 1)

    def forward(self, inputs: SiteInput) -> Scored:
        tokens = inputs.hidden_states.detach() if self.detach else inputs.hidden_states
        local, everywhere = functional.gelu(self.local_global(self.norm(tokens))).chunk(2, dim=-1)
        routable = inputs.state.routable.unsqueeze(1).to(everywhere.dtype)
        mean = (routable @ everywhere) / routable.sum(-1, keepdim=True).clamp(min=1)
        # A linear layer over both halves side by side, without repeating the mean for every token.
        mixed = functional.gelu(self.mix_local(local) + self.mix_global(mean))
        return Scored(self.score(mixed).squeeze(-1))

    def macs(self, shape: BackboneShape, tokens: int) -> int:
        return tokens * (shape.hidden * 2 * self.width + self.width**2 + self.width) + self.width**2
