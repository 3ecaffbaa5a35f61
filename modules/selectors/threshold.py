"""Threshold: as many tokens of a row as score high enough."""

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
    """Keeps the tokens whose score is above a threshold, so that a full image keeps more of them than an empty one.

    In training the cut is where it keeps the requested share of the whole batch, exactly, however fast the scores move; or of each
    row, which makes rows equally long, so that nothing is filled up. The
    threshold is a buffer, saved with the weights, that follows those cuts as a moving average; in evaluation it stands still, and
    no decision looks at another token. What a trace asks of ``keep`` moves it in training alone. Before it has seen a batch of training, evaluation takes the top k; of a
    causal model, where that would look ahead, what is above 0.

    Args:
        spec: the tokens that it chooses from.
        calibrate: follow the scores. If not, the threshold stays at 0, a probability of one half, and a regulariser of the
            budget has to hold the ratio.
        rate: weight of the newest batch in the moving average.
        bucket: rows are filled up to a multiple of it; None takes 16 in a causal model and 1 elsewhere.
        equal_rows: in training every row keeps its own share, by rank; None does so in a causal model, whose rows are mostly packed
            with text to one length, and not elsewhere. Needs ``calibrate``.
    """

    adaptive = True
    cuts = True
    float32_buffers = ("threshold", "batches")

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
            raise ValueError("selector 'threshold': equal_rows = true needs calibrate = true: a fixed threshold keeps what it keeps")
        self.calibrate, self.rate = calibrate, rate
        self.equal_rows = spec.causal if equal_rows is None else equal_rows
        self.top_k = TopKSelector(spec, bucket)
        self.threshold: Tensor
        self.batches: Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))

    @property
    def needs_probabilities(self) -> bool:  # type: ignore[override]
        return not self.calibrate

    def looks_ahead(self, request: Request) -> bool:
        # By rank in its row, in training alone.
        return self.training and self.equal_rows and request.keep < 1

    @torch.no_grad()
    def set_cut(self, keep: float) -> None:
        self.threshold.fill_(1 - keep)
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
            # It has seen no scores yet: as many of every row.
            return self.top_k(scores, state, replace(request, draws=None))  # type: ignore[no-any-return]
        # A copy, which stays what it is when the threshold moves on.
        return replace(self.decide(scores > cut, scores, state), cut=cut.clone())

    def _by_rows(self, scores: Tensor, state: TokenState, request: Request) -> Decision:
        """The highest share of every row, whatever documents it holds."""
        rows = replace(state, document=None)
        count = tokens_kept(rows.present, request.keep)
        decision: Decision = self.top_k(scores, rows, replace(request, count=count, draws=None))
        # The highest of those that go; where none goes, the lowest of all.
        eligible = scores.masked_fill(~state.routable, float("-inf"))
        highest = eligible.masked_fill(decision.kept_mask(state.tokens), float("-inf")).amax(-1, keepdim=True)
        return replace(decision, cut=torch.where(highest.isinf(), eligible.amin(-1, keepdim=True), highest))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> ThresholdSelector:
        # Scores are float32 in a model of any dtype, and a moving average stands still in bf16.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            cast = self._buffers[name]
            assert cast is not None
            self._buffers[name] = cast.float() if buffer.is_meta or cast.is_meta else buffer.to(cast.device, torch.float32)
        return self

    def follow(self, scores: Tensor, routable: Tensor, keep: float) -> Tensor:
        """The cut that keeps ``keep`` of the routable (B, M) scores, mean over ranks; moves the threshold towards it."""
        order = scores.masked_fill(~routable, float("-inf")).flatten().sort(descending=True).values
        present = routable.sum()
        # Of the tokens that are there: behind them lies filler, whose score no average survives.
        kept = (present * keep).round().long().clamp(max=present - 1).clamp(min=0)
        fitting = torch.where(present > 0, order.gather(0, kept[None]).squeeze(0), self.threshold.to(order.dtype))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(fitting)
            fitting = fitting / distributed.get_world_size()
        rate = torch.where(self.batches == 0, 1.0, self.rate)
        self.threshold.lerp_(fitting.to(self.threshold.dtype), rate.to(self.threshold.dtype))
        self.batches.add_(1).clamp_(max=1)
        return fitting
