"""Linear scorer: one trained weight vector, the router of Mixture-of-Depths."""

from __future__ import annotations

from torch import nn

from ..cost.shape import StackShape
from ..precision import Float32Linear
from ..site import SiteInput, TokenSpec
from .base import Scored, Scorer


class LinearScorer(Scorer):
    """A linear map of each token, logits in float32 (Mixture-of-Depths, arXiv 2404.02258).

    The score of a token does not depend on other tokens, so causal models can use it in generation.

    Args:
        spec: the tokens to score.
        detach: stop the gradient from the scorer into the backbone below it.
        bias: initial bias of the scores. With a value above 0 most tokens are processed at the start, which suits fine-tuning.
        zero: the weights start at 0, so that all tokens have the same score at first.
    """

    estimator = "straight_through"
    chunk_estimator = "confidence"
    probabilities = True

    def __init__(self, spec: TokenSpec, detach: bool = False, bias: float = 0.0, zero: bool = False) -> None:
        super().__init__(spec)
        self.detach = detach
        # The residual stream grows from layer to layer; with this norm, the routers of all layers start at the same scale.
        self.norm = nn.LayerNorm(spec.hidden_size, elementwise_affine=False)
        self.score = Float32Linear(spec.hidden_size, 1)
        nn.init.constant_(self.score.bias, bias)
        if zero:
            nn.init.zeros_(self.score.weight)

    def forward(self, inputs: SiteInput) -> Scored:
        tokens = inputs.hidden_states.detach() if self.detach else inputs.hidden_states
        return Scored(self.score(self.norm(tokens)).squeeze(-1))

    def macs(self, shape: StackShape, tokens: int) -> int:
        return tokens * shape.hidden
