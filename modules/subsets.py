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
    """(B, M, D) and (B, K) slots -> (B, K, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
