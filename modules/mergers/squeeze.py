"""Squeeze merger: merges every removed token into the most similar kept token."""

from __future__ import annotations

import torch

from ..cost.shape import StackShape
from ..scorers.base import Scored
from ..scorers.bipartite import METRICS, best_partner, metric_macs, metric_width, token_metric
from ..site import SiteInput, TokenSpec
from ..tokens.decision import Decision
from .base import Merged, Merger, keep_all, merge_into


class SqueezeMerger(Merger):
    """Merges each token that is not kept into its nearest kept token by cosine, weighted by size (TPS, arXiv 2304.10716).

    Args:
        spec: the tokens to merge.
        metric: what is compared: ``tokens``, the hidden states, or ``keys``, the keys of the site's layer.
        proportional: in later layers, log(size) is added to the attention logits of each key.
    """

    def __init__(self, spec: TokenSpec, metric: str = "tokens", proportional: bool = False) -> None:
        super().__init__(spec)
        if metric not in METRICS:
            raise ValueError(f"merger 'squeeze': metric = {metric!r} must be one of {', '.join(METRICS)}")
        self.metric, self.proportional = metric, proportional

    @property
    def reads_keys(self) -> bool:
        return self.metric == "keys"

    def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Merged:
        state = inputs.state
        if decision.keeps_all(state):
            return keep_all(inputs, self.proportional)
        kept = decision.kept_mask(state.tokens)
        widths = None
        if decision.valid is None and state.counts is not None:
            stay = decision.index.shape[1]
            widths = state.tokens - stay, stay - state.counts.protected
        with torch.no_grad():
            movable, target = state.routable & ~kept, state.routable & kept
            _, partner = best_partner(token_metric(inputs, self.metric), movable, target, widths, alike=widths is not None)
        return merge_into(inputs, decision, partner, self.proportional)

    def macs(self, shape: StackShape, tokens: int, kept: int) -> int:
        gone = tokens - kept
        compared = gone * (kept - shape.protected) * metric_width(shape, self.metric)
        return (gone > 0) * (metric_macs(shape, tokens, self.metric) + compared + gone * shape.hidden)
