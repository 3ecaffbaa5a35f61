"""Merging of tokens whose number is known: only tokens that leave and the tokens that absorb them are computed, all others are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gather import flat_slots


def merge_tokens(values: Tensor, size: Tensor, kept: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, weighted by size, of each kept token and the tokens that are merged into it. Kept tokens that absorb none stay bit-equal.

    Args:
        values: (B, M, C) tokens.
        size: (B, M) float32, sizes without gradient.
        kept: (B, K) int64 slots.
        gone: (B, R) int64, all other slots: K + R = M.
        into: (B, R) int64, for each token that is gone the number of its target among the kept ones.

    Returns:
        (B, K, C) means, and (B, K) float32 sums of sizes.
    """
    own, absorbed = size.gather(1, kept), size.gather(1, gone)
    total = own.scatter_add(1, into, absorbed)
    targets, every = flat_slots(into, kept.shape[1]), flat_slots(kept, values.shape[1])
    sums = total.flatten()[targets]
    merged: Tensor = _Merge.apply(  # type: ignore[no-untyped-call]
        values.flatten(0, 1),
        every,
        flat_slots(gone, values.shape[1]),
        targets,
        (own.flatten()[targets], absorbed.flatten(), sums.clamp(min=1e-6)),
    )
    return merged.view(*kept.shape, -1), total


class _Merge(torch.autograd.Function):
    """Rows ``kept`` of a matrix, with the rows ``gone`` merged into some of them. A target may occur several times in ``into``: what is
    written to it is the same each time."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, gone: Tensor, into: Tensor, sizes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        own, absorbed, total = (size.unsqueeze(-1) for size in sizes)
        ctx.save_for_backward(kept, gone, into, absorbed / total, own / total)
        merged = values.index_select(0, kept)
        # Any one of the places of a target in ``into``, the same for all of them, holds its sum.
        place = torch.arange(into.shape[0], device=into.device)
        place = torch.empty(kept.shape[0], dtype=torch.int64, device=into.device).index_copy_(0, into, place)[into]
        # In float32, because many tokens may be summed into one.
        sums = merged.index_select(0, into).float() * own
        sums.index_add_(0, place, values.index_select(0, gone).float() * absorbed)
        return merged.index_copy_(0, into, (sums.index_select(0, place) / total).to(merged.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        kept, gone, into, share, rest = ctx.saved_tensors
        of_target = gradient.index_select(0, into)
        whole = gradient.new_empty(kept.shape[0] + gone.shape[0], gradient.shape[1]).index_copy_(0, kept, gradient)
        whole.index_copy_(0, kept.index_select(0, into), (of_target * rest).to(gradient.dtype))
        whole.index_copy_(0, gone, (of_target * share).to(gradient.dtype))
        return whole, None, None, None, None
