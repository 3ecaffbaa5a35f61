"""Subsets of a row's tokens in compact form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compact:
    """Slots of a subset, in order.

    Attributes:
        index: (B, K) int64; filler repeats slots that are not in the subset.
        valid: (B, K) bool, False for filler.
    """

    index: Tensor
    valid: Tensor


def compact(mask: Tensor, width: int | None = None) -> Compact:
    """(B, M) bool -> its slots, at least one of them, filler behind.

    Args:
        mask: the subset.
        width: largest number of any row, where it is known; None asks the device for it.
    """
    numbers = mask.sum(-1)
    most = max(1, int(numbers.max()) if width is None else width)
    order = (~mask).byte().sort(dim=-1, stable=True).indices[:, :most]
    return Compact(order, torch.arange(most, device=mask.device) < numbers[:, None])


def take(values: Tensor, index: Tensor) -> Tensor:
    """(B, M, D) and (B, K) slots -> (B, K, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


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
