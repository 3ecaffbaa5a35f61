"""Gathering and scattering of subsets of a row's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compact:
    """The slots of a subset, in order.

    Attributes:
        index: (B, K) int64; padding holds slots that are not in the subset.
        valid: (B, K) bool, False for padding.
        empty: the subset is empty in every row.
    """

    index: Tensor
    valid: Tensor
    empty: bool


def compact(mask: Tensor, width: int | None = None, bucket: int = 1) -> Compact:
    """(B, M) bool -> the slots of its True entries, padded to the same number in each row, at least 1.

    Args:
        mask: the subset.
        width: largest number in any row, if it is known; None synchronises with the device to find it.
        bucket: K is rounded up to a multiple of it, at most to M, so that shapes repeat.
    """
    numbers = mask.sum(-1)
    most = int(numbers.max()) if width is None else width
    wide = min(mask.shape[1], -(-max(1, most) // bucket) * bucket)
    order = (~mask).byte().sort(dim=-1, stable=True).indices[:, :wide]
    return Compact(order, torch.arange(wide, device=mask.device) < numbers[:, None], most == 0)


def take(values: Tensor, index: Tensor) -> Tensor:
    """(B, M, D) and (B, K) slots, each at most once per row, -> (B, K, D).

    Copies whole tokens, forward and backward; a gather would index each of their D values.
    """
    flat = flat_slots(index, values.shape[1])
    if torch.is_grad_enabled() and values.requires_grad:
        taken: Tensor = _Take.apply(values, flat)  # type: ignore[no-untyped-call]
    else:
        taken = values.flatten(0, 1).index_select(0, flat)
    return taken.view(*index.shape, values.shape[-1])


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """``take`` for slots that may repeat in a row: backward sums the gradients of all copies of a token."""
    return values.flatten(0, 1).index_select(0, flat_slots(index, values.shape[1])).view(*index.shape, -1)


def take_out(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, D) and (B, K) slots, each at most once per row, -> (B, K, D), and the full (B, M, D) tensor, only for ``put_back``."""
    if torch.is_grad_enabled() and values.requires_grad:
        taken, rest = _TakeOut.apply(values, flat_slots(index, values.shape[1]))  # type: ignore[no-untyped-call]
        return taken.view(*index.shape, -1), rest
    return take(values, index), values


def put_back(rest: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """The full tensor from ``take_out`` with the slots at ``index`` replaced by ``new`` (B, K, D)."""
    flat = flat_slots(index, rest.shape[1])
    if torch.is_grad_enabled() and (rest.requires_grad or new.requires_grad):
        whole: Tensor = _PutBack.apply(rest, flat, new.flatten(0, 1))  # type: ignore[no-untyped-call]
        return whole
    return rest.flatten(0, 1).index_copy(0, flat, new.flatten(0, 1)).view_as(rest)


def take_shared(values: Tensor, index: Tensor) -> Tensor:
    """``take`` for values that are (1, M, D) if all rows share them."""
    return values[0].index_select(0, index.flatten()).view(*index.shape, -1) if values.shape[0] == 1 else take(values, index)


def sum_into(values: Tensor, into: Tensor) -> Tensor:
    """Sums the tokens that have the same target slot.

    Args:
        values: (B, M, D).
        into: (B, M) int64, target slot of each token.

    Returns:
        (B, M, D), zeros in slots that are no target.
    """
    if torch.compiler.is_exporting():
        # Runtimes of exported graphs lack scatter with a reduction, or run it slowly; a product with a 0/1 matrix is the same sum.
        slots = torch.arange(into.shape[1], device=into.device)
        return (into[:, None, :] == slots[:, None]).to(values.dtype) @ values
    return torch.zeros_like(values).scatter_add(1, into.unsqueeze(-1).expand_as(values), values)


def flat_slots(index: Tensor, tokens: int) -> Tensor:
    """(B, K) slots in rows of ``tokens`` -> (B·K,) slots in the flattened batch."""
    return (index + tokens * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


class _Take(torch.autograd.Function):
    """Selects rows of a matrix, each at most once, so that backward copies; index_select's own backward would add."""

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


class _TakeOut(torch.autograd.Function):
    """Backward writes the gradient of the taken tokens over that of the rest in their slots: one copy; adding both would need three."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(flat)
        return values.flatten(0, 1).index_select(0, flat), values.view_as(values)

    @staticmethod
    def backward(ctx: Any, taken: Tensor, rest: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        return rest.flatten(0, 1).index_copy(0, flat, taken.to(rest.dtype)).view_as(rest), None


class _PutBack(torch.autograd.Function):
    """Backward passes the gradient through to ``rest`` unchanged; ``_TakeOut`` overwrites it in the taken slots."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, flat: Tensor, new: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        return rest.flatten(0, 1).index_copy(0, flat, new).view_as(rest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        (flat,) = ctx.saved_tensors
        return gradient, None, gradient.flatten(0, 1).index_select(0, flat)
