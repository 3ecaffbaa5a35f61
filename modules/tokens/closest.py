"""The closest of a row's targets to each of its sources, without the matrix of all their products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import full_precision

# Products in memory at a time. On CPUs they stay in the cache; elsewhere few calls are worth more.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 21, 1 << 26
# Least number of sources in a product: every product copies all targets into the layout of the multiplication.
_LEAST = 512
# Width of the groups whose largest products are found first on CPUs, where a maximum alone is many times faster than one with its place.
_GROUP = 64


def closest(sources: Tensor, targets: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Largest product of each source with the targets of its row, and the number of that target, the first of equal ones.

    Memory grows with I + J, not with I · J; in compiled and exported graphs with I · J.

    Args:
        sources: (B, I, D) float32, I of at least 1.
        targets: (B, J, D) float32, J of at least 1.
        allowed: (B, J) bool, targets that count; None if all do.

    Returns:
        (B, I) float32, -inf in rows without an allowed target, and (B, I) int64.
    """
    (rows, number, _), among = sources.shape, targets.shape[1]
    block = _BLOCK if sources.device.type == "cpu" else _BLOCK_ELSEWHERE
    # A compiled graph has one product: the number of blocks would depend on the number of rows, which may be any.
    if torch.compiler.is_compiling() or rows * number * among <= block:
        return _closest(sources, targets, allowed)
    best = sources.new_empty(rows, number)
    which = torch.empty(rows, number, dtype=torch.int64, device=sources.device)
    rows_at_once, at_once = max(1, block // (number * among)), max(_LEAST, block // among)
    for row in range(0, rows, rows_at_once):
        several = slice(row, row + rows_at_once)
        counted = None if allowed is None else allowed[several]
        for first in range(0, number, at_once):
            some = slice(first, first + at_once)
            best[several, some], which[several, some] = _closest(sources[several, some], targets[several], counted)
    return best, which


def _closest(sources: Tensor, targets: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    with full_precision(sources.device):
        products = torch.bmm(sources, targets.transpose(1, 2))
    if allowed is not None:
        products.masked_fill_(~allowed[:, None], -torch.inf)
    whole = products.shape[-1] // _GROUP * _GROUP
    if products.device.type != "cpu" or whole < 4 * _GROUP or torch.compiler.is_compiling():
        best, which = products.max(-1)
        return best, which
    groups = products[..., :whole].view(*products.shape[:2], -1, _GROUP)
    best, group = groups.amax(-1).max(-1)
    inside = groups.gather(2, group[..., None, None].expand(-1, -1, 1, _GROUP)).squeeze(2)
    which = group * _GROUP + inside.argmax(-1)
    if whole < products.shape[-1]:
        other, behind = products[..., whole:].max(-1)
        which = torch.where(other > best, behind + whole, which)
        best = torch.maximum(best, other)
    return best, which
