"""Bipartite soft matching: each token of even rank is compared with all tokens of odd rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..cost.shape import StackShape
from ..precision import full_precision
from ..site import SiteInput, TokenSpec
from ..tokens.gather import compact, take
from .base import Scored, Scorer

METRICS = ("keys", "tokens")


class BipartiteScorer(Scorer):
    """Minus the cosine to the best partner (ToMe, arXiv 2210.09461): tokens of even rank may be removed, tokens of odd rank are kept.

    With merger ``bipartite`` and a top-k selector, the most similar pairs are merged. At most half of the tokens can be removed.

    Args:
        spec: the tokens to score.
        metric: what is compared: ``keys``, the keys of the site's layer averaged over heads, as in the paper; or ``tokens``, the hidden
            states, which needs no projection. At site ``between`` the keys are computed from the hidden states after attention.
    """

    lookahead = True
    matches = True
    count = "half"

    def __init__(self, spec: TokenSpec, metric: str = "keys") -> None:
        super().__init__(spec)
        if metric not in METRICS:
            raise ValueError(f"scorer 'bipartite': metric = {metric!r} must be one of {', '.join(METRICS)}")
        self.metric = metric

    @property
    def reads_keys(self) -> bool:
        return self.metric == "keys"

    @torch.no_grad()
    def forward(self, inputs: SiteInput) -> Scored:
        state = inputs.state
        if state.valid is None:
            rank = torch.arange(state.tokens, device=state.position.device).expand(state.rows, -1)
        else:
            rank = state.valid.long().cumsum(-1) - 1
        movable = state.routable & (rank % 2 == 0)
        target = state.routable & (rank % 2 == 1)
        widths = None
        if state.counts is not None:
            # Known on the host, without a device synchronisation.
            first = state.counts.protected
            widths = len(range(first + first % 2, state.tokens, 2)), len(range(first + 1 - first % 2, state.tokens, 2))
        similarity, partner = best_partner(token_metric(inputs, self.metric), movable, target, widths)
        # Tokens of odd rank, and tokens without a partner, get the highest score, so they are kept.
        stays = ~movable | ~target.any(-1, keepdim=True)
        return Scored((-similarity).masked_fill(stays, torch.finfo(torch.float32).max), partner=partner)

    def macs(self, shape: StackShape, tokens: int) -> int:
        routable = tokens - shape.protected
        pairs = (routable // 2) * (routable - routable // 2)
        return metric_macs(shape, tokens, self.metric) + pairs * metric_width(shape, self.metric)


def token_metric(inputs: SiteInput, metric: str) -> Tensor:
    """(B, M, D) float32 features to compare, of unit length."""
    features = inputs.hidden_states.detach()
    if metric == "keys":
        features = inputs.adapter.keys(inputs.layer, features).mean(1)
    return functional.normalize(features.float(), dim=-1)


def metric_width(shape: StackShape, metric: str) -> int:
    """Width D of the compared features."""
    return shape.hidden // shape.heads if metric == "keys" else shape.hidden


def metric_macs(shape: StackShape, tokens: int, metric: str) -> int:
    """MACs to compute the features."""
    return tokens * shape.hidden**2 if metric == "keys" else 0


def best_partner(metric: Tensor, movable: Tensor, target: Tensor, widths: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """The most similar target of every movable token.

    Args:
        metric: (B, M, D) features of unit length.
        movable: (B, M) bool, tokens that need a partner.
        target: (B, M) bool, tokens that can be a partner.
        widths: largest numbers of movable and of target tokens per row; None if they are not known on the host.

    Returns:
        (B, M) cosine to the best target, and (B, M) int64 slot of that target. For tokens that are not movable: 0 and their own slot.
    """
    rows, tokens, _ = metric.shape
    slots = torch.arange(tokens, device=metric.device).expand(rows, -1)
    sources, targets = compact(movable, widths and widths[0]), compact(target, widths and widths[1])
    with full_precision(metric.device):
        products = take(metric, sources.index) @ take(metric, targets.index).transpose(1, 2)
    best, which = products.masked_fill(~targets.valid[:, None], -torch.inf).max(-1)
    partner = targets.index.gather(1, which)
    # Padding of the compact form is written to an extra slot after the last token.
    written = sources.index.masked_fill(~sources.valid, tokens)
    similarity = functional.pad(metric.new_zeros(rows, tokens), (0, 1)).scatter(1, written, best)[:, :tokens]
    return similarity, functional.pad(slots, (0, 1)).scatter(1, written, partner)[:, :tokens]
