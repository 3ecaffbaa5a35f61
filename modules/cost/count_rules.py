"""How many tokens a stage keeps: one set of functions for training, evaluation, cost, bench and export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

# Decimal products such as 0.145 * 100 land a hair under the half that they mean; far above float64's error, far below 1 token.
_HALF = 0.5 + 1e-9


@overload
def tokens_kept(present: int, keep: float) -> int: ...


@overload
def tokens_kept(present: Tensor, keep: float) -> Tensor: ...


def tokens_kept(present: int | Tensor, keep: float) -> int | Tensor:
    """Routable tokens that a stage keeps: max(1, round-half-up(keep * present)), and none of none.

    Args:
        present: routable tokens entering the stage, an int or an int64 tensor of any shape (one count per row).
        keep: fraction kept, in (0, 1].

    Returns:
        The count, of the same type and shape as ``present``.

    Raises:
        ValueError: ``keep`` is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep} must be in (0, 1]: it is the fraction of routable tokens that is kept, not removed")
    if isinstance(present, Tensor):
        count = torch.floor(present.double() * keep + _HALF).long()
        return torch.minimum(count.clamp(min=1), present)
    return min(present, max(1, math.floor(present * keep + _HALF)))


@dataclass(frozen=True)
class StageCount:
    """What a count rule may look at, beside the tokens present and ``keep``.

    Attributes:
        original: routable tokens before the first stage.
        index: position of the stage among the model's stages, from 0.
    """

    original: int | Tensor
    index: int


# present, keep, stage -> routable tokens that leave the stage, a merger's fused token included
CountRule = Callable[[int | Tensor, float, StageCount], int | Tensor]


def _round_half_up(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    return tokens_kept(present, keep)


def _dynamicvit(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """int(n0 * keep^(stage + 1)), counted from the tokens before the first stage (DynamicViT, arXiv 2106.02034)."""
    fraction = keep ** (stage.index + 1)
    if isinstance(stage.original, Tensor):
        return torch.minimum(torch.floor(stage.original.double() * fraction + 1e-9).long().clamp(min=1), torch.as_tensor(present))
    return min(int(present), max(1, math.floor(stage.original * fraction + 1e-9)))


def _evit(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """ceil(n * keep) tokens and one fused from the rest (EViT, arXiv 2202.07800)."""
    if isinstance(present, Tensor):
        return torch.minimum(torch.ceil(present.double() * keep - 1e-9).long() + 1, present)
    return min(present, math.ceil(present * keep - 1e-9) + 1)


def _half(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """The usual count, but never less than half: matching in pairs can take away no more (ToMe, arXiv 2210.09461)."""
    return at_least_half(present, tokens_kept(present, keep))


def at_least_half(present: int | Tensor, count: int | Tensor) -> int | Tensor:
    """``count``, or the larger half of ``present`` where that is more."""
    if isinstance(present, Tensor):
        return torch.maximum(torch.as_tensor(count, device=present.device), present - present // 2)
    return max(int(count), present - present // 2)


COUNT_RULES: dict[str, CountRule] = {"round": _round_half_up, "dynamicvit": _dynamicvit, "evit": _evit, "half": _half}
