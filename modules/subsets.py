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
    rows, tokens, _ = values.shape
    # Whole tokens are copied, forward and backward, where a gather would look up every one of their D values.
    flat = index + tokens * torch.arange(rows, device=index.device)[:, None]
    return values.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape, -1)
