"""Threshold selector: keeps the tokens whose score is above a threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from ..cost.count_rules import tokens_kept
from ..site import TokenSpec
from ..tokens.decision import Decision
from ..tokens.state import TokenState
from .base import Request, Selector, everything
from .top_k import TopKSelector


class ThresholdSelector(Selector):
    """Keeps the tokens whose score is above a threshold, so that a row with more content keeps more tokens.

    In training the threshold is computed for each batch, so that exactly the requested fraction of the batch is kept; with
    ``equal_rows``, of each row, which needs no padding. A buffer, saved with the weights, follows these thresholds as a moving average.
    In evaluation the buffer is the threshold, and each token is decided by itself; ``Trace.keep`` changes the threshold only in
    training. Where the requested fraction moves, the buffer moves by as much as the newest batch's threshold does, without the average's
    lag. Before the first training batch evaluation uses top-k; a causal model refuses it.

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
    one_keep = True
    float32_buffers = ("threshold", "batches", "requested")

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
        self.requested: Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))
        # The fraction that the threshold was last set for.
        self.register_buffer("requested", torch.ones((), dtype=torch.float32))
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
    def calibrates(self) -> bool:
        return self.calibrate

    @torch.no_grad()
    def reset(self) -> None:
        self.threshold.zero_()
        self.batches.zero_()
        self.requested.fill_(1)
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
        self.requested.fill_(keep)
        self.batches.fill_(1)

    @torch.no_grad()
    def forward(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        if request.keep >= 1:
            return everything(state)
        cut = self.threshold
        if self.training and self.calibrate:
            cut = self.follow(scores, state.routable, request.keep)
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

    def follow(self, scores: Tensor, routable: Tensor, keep: float) -> Tensor:
        """The threshold that keeps the fraction ``keep`` of the routable (B, M) scores, mean over the ranks that have such scores; updates
        the moving average."""
        order = scores.masked_fill(~routable, float("-inf")).flatten().sort(descending=True).values
        present = routable.sum()
        # For the fraction that is requested now, and for the last one. The index must stay within the routable tokens: the -inf of other
        # tokens would spoil the moving average.
        shares = torch.stack([torch.full_like(self.requested, keep), self.requested])
        kept = (present * shares).round().long().clamp(max=present - 1).clamp(min=0)
        some = present > 0
        sums = torch.cat([torch.where(some, order.gather(0, kept), 0.0), some.to(order.dtype)[None]])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        *totals, ranks = sums.to(self.threshold.dtype)
        # Without a routable token on any rank the threshold stays.
        fitting, before = (torch.where(ranks > 0, total / ranks.clamp(min=1), self.threshold) for total in totals)
        rate = torch.where(self.batches == 0, 1.0, self.rate)
        self.threshold.add_(fitting - before).lerp_(fitting, rate.to(self.threshold.dtype))
        self.batches.add_(ranks > 0).clamp_(max=1)
        self.requested.copy_(torch.where(ranks > 0, keep, self.requested))
        return fitting
