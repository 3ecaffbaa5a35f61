"""Subsets of a row's tokens in compact form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compact:
    """Slots of a subset, in order.

    Attributes:
        index: (B, K) int64; filler repeats slots that are not in the subset.
        valid: (B, K) bool, False for filler.
        empty: no row has any.
    """

    index: Tensor
    valid: Tensor
    empty: bool


def compact(mask: Tensor, width: int | None = None, bucket: int = 1) -> Compact:
    """(B, M) bool -> its slots, at least one of them, filler behind.

    Args:
        mask: the subset.
        width: largest number of any row, where it is known; None asks the device for it.
        bucket: K is a multiple of it where there are as many slots, so that shapes repeat.
    """
    numbers = mask.sum(-1)
    most = int(numbers.max()) if width is None else width
    wide = min(mask.shape[1], -(-max(1, most) // bucket) * bucket)
    order = (~mask).byte().sort(dim=-1, stable=True).indices[:, :wide]
    return Compact(order, torch.arange(wide, device=mask.device) < numbers[:, None], most == 0)


def take(values: Tensor, index: Tensor) -> Tensor:
    """(B, M, D) and (B, K) slots, each at most once in a row, -> (B, K, D).

    Whole tokens are copied, forward and backward, where a gather would look up every one of their D values.
    """
    flat = _flat(index, values.shape[1])
    if torch.is_grad_enabled() and values.requires_grad:
        taken: Tensor = _Take.apply(values, flat)  # type: ignore[no-untyped-call]
    else:
        taken = values.flatten(0, 1).index_select(0, flat)
    return taken.view(*index.shape, -1)


def put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """(B, M, D) with the (B, K, D) at (B, K) slots, each at most once in a row."""
    return values.flatten(0, 1).index_copy(0, _flat(index, values.shape[1]), new.flatten(0, 1)).view_as(values)


def take_shared(values: Tensor, index: Tensor) -> Tensor:
    """``take`` of values that are (1, M, D) where all rows have the same."""
    return values[0].index_select(0, index.flatten()).view(*index.shape, -1) if values.shape[0] == 1 else take(values, index)


def sum_into(values: Tensor, into: Tensor) -> Tensor:
    """Every token added up in the slot that it goes to.

    Args:
        values: (B, M, D).
        into: (B, M) int64, slot that each token is added to.

    Returns:
        (B, M, D), zeros in slots that nothing goes to.
    """
    if torch.compiler.is_exporting():
        # Runtimes that read exported graphs have no scatter with a reduction, or a slow one; a product with zeros and ones is the same sum.
        slots = torch.arange(into.shape[1], device=into.device)
        return (into[:, None, :] == slots[:, None]).to(values.dtype) @ values
    return torch.zeros_like(values).scatter_add(1, into.unsqueeze(-1).expand_as(values), values)


def _flat(index: Tensor, tokens: int) -> Tensor:
    """(B, K) slots in rows of ``tokens`` -> (B·K,) slots with the rows end to end."""
    return (index + tokens * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


class _Take(torch.autograd.Function):
    """Rows of a matrix, each at most once, so that backward copies where index_select's own would add."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.shape = values.shape
        return values.flatten(0, 1).index_select(0, flat)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        whole.flatten(0, 1).index_copy_(0, flat, gradient)
        return whole, None
