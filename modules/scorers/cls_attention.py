"""CLS-attention scorer: the attention from CLS to every token."""

from __future__ import annotations

import torch

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from .base import Scored, Scorer


class ClsAttentionScorer(Scorer):
    """Mean over heads of softmax(q_cls · K) in the site's layer (criterion of EViT, arXiv 2202.07800).

    Only one row of the attention matrix is computed, with the layer's own norm and projections, so the layer keeps its fused
    attention. The scorer is not trained; its scores change with the backbone.
    """

    reads_cls = True

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__(spec)
        if not spec.has_cls:
            raise ValueError(
                f"scorer 'cls_attention' needs a CLS token, which {spec.family} has not: "
                "take one that reads the tokens (learned, evidence) or the image (patch_energy, uniform_grid)"
            )

    @torch.no_grad()
    def forward(self, inputs: SiteInput) -> Scored:
        query, key, scale = inputs.adapter.cls_query_and_keys(inputs.layer, inputs.hidden_states)
        logits = (query.float() * scale) @ key.float().transpose(-1, -2)
        if inputs.state.valid is not None:
            logits = logits.masked_fill(~inputs.state.valid[:, None, None], float("-inf"))
        return Scored(logits.softmax(-1).mean(1).squeeze(1))

    def macs(self, shape: StackShape, tokens: int) -> int:
        return shape.hidden**2 * (tokens + 1) + tokens * shape.hidden
