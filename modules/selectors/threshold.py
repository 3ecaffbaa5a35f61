"""Threshold selector: keeps the tokens whose score is above a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from ..cost.count_rules import tokens_kept
from ..site import TokenSpec
from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Request, Selector, everything
from .top_k import TopKSelector

# Thresholds are followed of fractions with evenly spaced log-odds from -_FAR to _FAR (.002 to .998), besides that of the stage's own keep.
_LEVELS, _FAR = 63, 6.2
# A batch counts in full for its own fraction, and less for others, down to the least at this distance and beyond.
_NEAR, _LEAST = 0.25, 0.05


class ThresholdSelector(Selector):
    """Keeps the tokens whose score is above a threshold, so that a row with more content keeps more tokens.

    In training the threshold is computed for each batch, so that exactly the requested fraction of the batch is kept; with
    ``equal_rows``, of each row, which needs no padding. A buffer, saved with the weights, follows the threshold of the stage's own keep as
    a moving average, and in evaluation each token is decided by it alone. A second buffer follows the thresholds of 63 other fractions,
    between which those of other keeps are interpolated (``Trace.keep``, ``set_keep``); a batch counts less for fractions far from the one
    it was trained with. Before the first training batch evaluation uses top-k; a causal model refuses it.

    Args:
        spec: the tokens to select from.
        calibrate: the threshold follows the scores, without exploration noise. If False, it stays at 0, which is keep probability 0.5,
            with logistic noise on the scores; the budget needs a controller to hold the ratio.
        rate: weight of the newest batch in the moving average.
        bucket: the padded length is a multiple of it; None means 16 in a causal model and 1 otherwise.
        equal_rows: in training every row keeps the requested fraction, by rank. None means True in a causal model, whose rows are
            mostly packed with documents to one length, and False otherwise. Needs ``calibrate``.
    """

    adaptive = True
    cuts = True
    float32_buffers = ("threshold", "batches", "levels")

    def __init__(
        self,
        spec: TokenSpec,
        calibrate: bool = True,
        rate: float = 0.1,
        bucket: int | None = None,
        equal_rows: bool | None = None,
    ) -> None:
        super().__init__(spec, bucket)
        if not 0 < rate <= 1:
            raise ValueError(f"selector 'threshold': rate = {rate} must be in (0, 1]")
        if equal_rows and not calibrate:
            raise ValueError("selector 'threshold': equal_rows = true needs calibrate = true: a fixed threshold cannot hold a fraction")
        self.calibrate, self.rate = calibrate, rate
        self.equal_rows = spec.causal if equal_rows is None else equal_rows
        self.top_k = TopKSelector(spec, bucket)
        self.threshold: Tensor
        self.batches: Tensor
        self.levels: Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))
        # Thresholds of the fractions of _fractions.
        self.register_buffer("levels", torch.zeros(_LEVELS, dtype=torch.float32))
        self._set = False

    @property
    def needs_probabilities(self) -> bool:  # type: ignore[override]
        return not self.calibrate

    @property
    def explores(self) -> bool:  # type: ignore[override]
        return not self.calibrate

    @property
    def ignores_noise(self) -> bool:  # type: ignore[override]
        # A moving threshold would follow the noise.
        return self.calibrate

    @property
    def one_keep(self) -> bool:  # type: ignore[override]
        # A fixed threshold keeps what the router learned.
        return not self.calibrate

    @property
    def calibrates(self) -> bool:
        return self.calibrate

    @torch.no_grad()
    def reset(self) -> None:
        self.threshold.zero_()
        self.batches.zero_()
        self.levels.zero_()
        self._set = False

    @property
    def uncalibrated(self) -> bool:
        if not self.calibrate or self._set or self.batches.is_meta:
            return False
        # Read from the device until it is set, and never after.
        self._set = bool(self.batches)
        return not self._set

    def is_noncausal(self, request: Request) -> bool:
        # In training, equal_rows ranks the scores of a row.
        return self.training and self.equal_rows and request.keep < 1

    @torch.no_grad()
    def set_cut(self, keep: float) -> None:
        self.threshold.fill_(1 - keep)
        self.levels.copy_(1 - _fractions(self.levels))
        self.batches.fill_(1)

    @torch.no_grad()
    def move_cut(self, before: float | None, keep: float) -> None:
        if self.calibrate:
            self.threshold.copy_(self.cut_for(Request(keep, 0, own=before)))

    def cut_for(self, request: Request) -> Tensor:
        """The threshold in evaluation: that of the stage's own keep, or of another requested one."""
        own = request.own
        if not self.calibrate or request.keep == own:
            return self.threshold
        level = self._level(request.keep)
        # Exact at the stage's own keep. One that keeps everything has no threshold.
        return level if own is None or own >= 1 else level + self.threshold - self._level(own)

    @torch.no_grad()
    def join_levels(self, found: Mapping[float, Tensor]) -> None:
        """Sets ``levels`` from what they were after batches with each of these keeps: each fraction's from the keeps next to it."""
        keeps = sorted(found)
        places = _fractions(self.levels).logit()
        self.levels.copy_(found[keeps[0]])
        for lower, upper in pairwise(keeps):
            share = (places - _log_odds(lower)) / (_log_odds(upper) - _log_odds(lower))
            self.levels.copy_(torch.where(share > 0, found[lower].lerp(found[upper], share.clamp(0, 1)), self.levels))

    def _level(self, keep: float) -> Tensor:
        """The threshold of a fraction by the two nearest levels; the outermost ones stand for what lies beyond."""
        place = (min(max(_log_odds(keep), -_FAR), _FAR) + _FAR) / (2 * _FAR) * (_LEVELS - 1)
        lower = min(max(math.floor(place), 0), _LEVELS - 2)
        return self.levels[lower].lerp(self.levels[lower + 1], place - lower)

    @torch.no_grad()
    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep >= 1:
            return everything(state)
        followed = self.training and self.calibrate
        cut = self.follow(scores, state.routable, request) if followed else self.cut_for(request)
        if followed:
            if self.equal_rows:
                return self._by_rows(scores, state, request)
        elif self.calibrate and not self.causal and not self.batches.bool():
            # No training batch was seen, so there is no threshold yet.
            return self.top_k(scores, state, replace(request, draws=None))  # type: ignore[no-any-return]
        elif self.explores and request.draws is not None:
            # The difference of two Gumbel draws is a logistic draw.
            scores = scores + torch.logit(request.draws) * request.noise
        # A copy, since later batches change the threshold in place.
        return replace(self.decide(scores > cut, scores, state), cut=cut.clone())

    def _by_rows(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        """Keeps the highest scores of every row by rank, across its documents."""
        rows = replace(state, document=None)
        count = tokens_kept(rows.present, request.keep)
        decision: Decision = self.top_k(scores, rows, replace(request, count=count, draws=None))
        # The threshold is the highest removed score; if no token is removed, the lowest score.
        eligible = scores.masked_fill(~state.routable, float("-inf"))
        highest = eligible.masked_fill(decision.kept_mask(state.tokens), float("-inf")).amax(-1, keepdim=True)
        return replace(decision, cut=torch.where(highest.isinf(), eligible.amin(-1, keepdim=True), highest))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> ThresholdSelector:
        # Scores are float32 in a model of any dtype, and a moving average in bf16 would stop changing.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            cast = self._buffers[name]
            assert cast is not None
            self._buffers[name] = cast.float() if buffer.is_meta or cast.is_meta else buffer.to(cast.device, torch.float32)
        return self

    def follow(self, scores: Tensor, routable: Tensor, request: Request) -> Tensor:
        """The threshold that keeps the requested fraction of the routable (B, M) scores, mean over the ranks that have such scores; updates
        the moving averages."""
        own = request.keep if request.own is None else request.own
        order = scores.masked_fill(~routable, float("-inf")).flatten().sort(descending=True).values
        present = routable.sum()
        asked = [torch.full_like(self.levels[:1], keep) for keep in (request.keep, own)]
        fractions = torch.cat([*asked, _fractions(self.levels)])
        # The index must stay within the routable tokens: the -inf of other tokens would spoil the moving averages.
        kept = (present * fractions).round().long().clamp(max=present - 1).clamp(min=0)
        some = present > 0
        sums = torch.cat([torch.where(some, order.gather(0, kept), 0.0), some.to(order.dtype)[None]]).to(self.levels.dtype)
        if not request.alone and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        ranks = sums[-1]
        # Without a routable token on any rank they stay.
        found = torch.where(ranks > 0, sums[:-1] / ranks.clamp(min=1), torch.cat([self.threshold.expand(2), self.levels]))
        weights = (1 - (fractions[1:] - request.keep).abs() / _NEAR).clamp(min=_LEAST)
        # The plain mean of the first batches, which become a moving average.
        rates = torch.where(self.batches == 0, 1.0, weights / (self.batches + 1).clamp(max=1 / self.rate))
        self.threshold.lerp_(found[1], rates[0])
        self.levels.lerp_(found[2:], rates[1:])
        self.batches.add_(ranks > 0).clamp_(max=1 / self.rate)
        return found[0]


def _log_odds(fraction: float) -> float:
    return math.log(fraction) - math.log1p(-fraction) if 0 < fraction < 1 else math.copysign(math.inf, fraction - 0.5)


def _fractions(like: Tensor) -> Tensor:
    """(_LEVELS,) fractions whose thresholds are followed."""
    return torch.linspace(-_FAR, _FAR, _LEVELS, dtype=like.dtype, device=like.device).sigmoid()
