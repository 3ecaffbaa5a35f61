"""Self-attention scorer: how much the tokens of a row ask for a token, by one trained head."""

from __future__ import annotations

from torch import nn

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from ..tokens.means import mean_of_routable
from .base import Scored, Scorer


class SelfAttentionScorer(Scorer):
    """s_i = mean over j of (W_q x_i) · (W_k x_j) / √d, of normalised tokens x (VisionSelector, arXiv 2510.16598).

    The mean is taken of the keys first, which gives the same scores without a matrix of all pairs.

    Args:
        spec: the tokens to score.
        width: width d of queries and keys; None means C // 2, as published.
        detach: stop the gradient from the scorer into the backbone below it.
    """

    estimator = "soft_top_k"
    lookahead = True

    def __init__(self, spec: TokenSpec, width: int | None = None, detach: bool = False) -> None:
        super().__init__(spec)
        if width is not None and width < 1:
            raise ValueError(f"scorer 'self_attention': width = {width} must be at least 1")
        self.width = width or max(1, spec.hidden_size // 2)
        self.detach = detach
        self.norm = nn.LayerNorm(spec.hidden_size, elementwise_affine=False)
        self.query = nn.Linear(spec.hidden_size, self.width)
        self.key = nn.Linear(spec.hidden_size, self.width)

    def forward(self, inputs: SiteInput) -> Scored:
        tokens = self.norm(inputs.hidden_states.detach() if self.detach else inputs.hidden_states)
        key = self.key(mean_of_routable(tokens, inputs.state))
        # A product and a sum, not a matrix product, which autocast would compute in bf16.
        return Scored((self.query(tokens).float() * key.float()).sum(-1) * self.width**-0.5)

    def macs(self, shape: StackShape, tokens: int) -> int:
        return (tokens + 1) * shape.hidden * self.width + tokens * (shape.hidden + self.width)
