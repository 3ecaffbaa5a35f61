"""Bipartite soft matching: each token of even rank is compared with all tokens of odd rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..cost.shape import StackShape
from ..site import SiteInput, TokenSpec
from ..tokens.closest import closest
from ..tokens.gather import compact, take
from ..tokens.state import TokenState
from .base import Scored, Scorer

METRICS = ("keys", "tokens")


class BipartiteScorer(Scorer):
    """Minus the cosine to the best partner (ToMe, arXiv 2210.09461): tokens of even rank may be removed, tokens of odd rank are kept.

    With merger ``bipartite`` and a top-k selector, the most similar pairs are merged. At most half of the tokens can be removed.

    With ``window`` a token is compared with tokens of its own window alone, so that time and memory grow linearly with the length. A row
    of at most ``window`` tokens is one window.

    Args:
        spec: the tokens to score.
        metric: what is compared: ``keys``, the keys of the site's layer averaged over heads, as in the paper; or ``tokens``, the hidden
            states, which needs no projection. At site ``between`` the keys are computed from the hidden states after attention.
        window: tokens of a window, an even number: consecutive tokens of a row, padding left out, protected ones included; the last window
            is shorter, or longer by one. None compares all tokens.
    """

    lookahead = True
    matches = True
    count = "half"

    def __init__(self, spec: TokenSpec, metric: str = "keys", window: int | None = None) -> None:
        super().__init__(spec)
        if metric not in METRICS:
            raise ValueError(f"scorer 'bipartite': metric = {metric!r} must be one of {', '.join(METRICS)}")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 2 or window % 2):
            raise ValueError(f"scorer 'bipartite': window = {window!r} must be an even number of tokens, at least 2, or null for none")
        self.metric, self.window = metric, window

    @property
    def reads_keys(self) -> bool:
        return self.metric == "keys"

    @torch.no_grad()
    def forward(self, inputs: SiteInput) -> Scored:
        state, metric = inputs.state, token_metric(inputs, self.metric)
        if state.counts is not None:
            similarity, partner = self._of_even_slots(metric, state.counts.protected)
        else:
            similarity, partner = self._of_even_ranks(metric, state)
        # Tokens of odd rank, and tokens without a partner, get the highest score, so they are kept.
        return Scored((-similarity).clamp(max=torch.finfo(torch.float32).max), partner=partner)

    def _of_even_slots(self, metric: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """As ``best_partner``, where the slots from ``first`` on are routable: halves of a window are slices."""
        rows, tokens, _ = metric.shape
        similarity = metric.new_full((rows, tokens), -torch.inf)
        partner = torch.arange(tokens, device=metric.device).repeat(rows, 1)
        for begin, end in self._windows(tokens):
            even, odd = max(begin, first + first % 2), max(begin + 1, first + 1 - first % 2)
            if even < end and odd < end:
                best, which = closest(metric[:, even:end:2], unit(metric[:, odd:end:2]))
                similarity[:, even:end:2] = best / length(metric[:, even:end:2]).squeeze(-1)
                partner[:, even:end:2] = odd + 2 * which
        return similarity, partner

    def _of_even_ranks(self, metric: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
        """As ``best_partner``, with any padding and any protected tokens."""
        if state.valid is None:
            rank = torch.arange(state.tokens, device=metric.device).expand(state.rows, -1)
        else:
            rank = state.valid.long().cumsum(-1) - 1
        movable, target = state.routable & (rank % 2 == 0), state.routable & (rank % 2 == 1)
        if self.window is None or len(self._windows(state.tokens)) == 1:
            return best_partner(metric, movable, target)
        # The last token of a row, if it would be alone, belongs to the window in front.
        window = (rank // self.window).minimum((rank[:, -1:] - 1).clamp(min=0) // self.window)
        widths = self.window // 2 + 1, self.window // 2
        similarity, partner = metric.new_full(rank.shape, -torch.inf), torch.arange(state.tokens, device=metric.device).expand_as(rank)
        for index, _ in enumerate(self._windows(state.tokens)):
            here = window == index
            found, of = best_partner(metric, movable & here, target & here, widths)
            similarity, partner = torch.where(movable & here, found, similarity), torch.where(movable & here, of, partner)
        return similarity, partner

    def _windows(self, tokens: int) -> list[tuple[int, int]]:
        """First token of each window of a row, and the first one behind it."""
        if self.window is None or tokens <= self.window + 1:
            return [(0, tokens)]
        begins = list(range(0, tokens - 1, self.window))
        return list(zip(begins, [*begins[1:], tokens], strict=True))

    def macs(self, shape: StackShape, tokens: int) -> int:
        first, width = shape.protected, metric_width(shape, self.metric)
        pairs = 0
        for begin, end in self._windows(tokens):
            routable = max(0, end - max(begin, first))
            pairs += (routable // 2) * (routable - routable // 2)
        return metric_macs(shape, tokens, self.metric) + pairs * width


def token_metric(inputs: SiteInput, metric: str) -> Tensor:
    """(B, M, D) float32 features to compare, of any length."""
    features = inputs.hidden_states.detach()
    if metric == "keys":
        features = inputs.adapter.mean_keys(inputs.layer, features)
    return features.float()


def metric_width(shape: StackShape, metric: str) -> int:
    """Width D of the compared features."""
    return shape.hidden // shape.heads if metric == "keys" else shape.hidden


def metric_macs(shape: StackShape, tokens: int, metric: str) -> int:
    """MACs to compute the features."""
    return tokens * shape.hidden * metric_width(shape, metric) if metric == "keys" else 0


def length(features: Tensor) -> Tensor:
    """(..., 1) length of (..., D) features, never 0."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return norm.clamp(min=1e-12)


def unit(features: Tensor) -> Tensor:
    """(..., D) features of unit length."""
    return features / length(features)


def best_partner(
    metric: Tensor, movable: Tensor, target: Tensor, widths: tuple[int, int] | None = None, alike: bool = False
) -> tuple[Tensor, Tensor]:
    """The target most similar to each movable token.

    Args:
        metric: (B, M, D) float32 features.
        movable: (B, M) bool, tokens that need a partner.
        target: (B, M) bool, tokens that can be a partner.
        widths: largest numbers of movable and of target tokens per row; None if they are not known on the host.
        alike: every row has just these numbers.

    Returns:
        (B, M) cosine to the best target, and (B, M) int64 slot of that target. -inf for tokens that are not movable, with their own slot,
        and in rows without a target.
    """
    rows, tokens, _ = metric.shape
    slots = torch.arange(tokens, device=metric.device).expand(rows, -1)
    sources, targets = compact(movable, widths and widths[0]), compact(target, widths and widths[1])
    compared = take(metric, sources.index)
    best, which = closest(compared, unit(take(metric, targets.index)), None if alike else targets.valid)
    best, partner = best / length(compared).squeeze(-1), targets.index.gather(1, which)
    # Padding of the compact form is written to an extra slot after the last token.
    written = sources.index.masked_fill(~sources.valid, tokens)
    similarity = functional.pad(metric.new_full((rows, tokens), -torch.inf), (0, 1)).scatter(1, written, best)[:, :tokens]
    return similarity, functional.pad(slots, (0, 1)).scatter(1, written, partner)[:, :tokens]
