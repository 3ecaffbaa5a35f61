"""Count rules: the number of tokens that a stage keeps, for training, evaluation, cost, bench and export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

# Decimal products such as 0.145 * 100 are slightly below the half that they should be. 1e-9 is far above float64's error.
_HALF = 0.5 + 1e-9


@overload
def tokens_kept(present: int, keep: float) -> int: ...


@overload
def tokens_kept(present: Tensor, keep: float) -> Tensor: ...


def tokens_kept(present: int | Tensor, keep: float) -> int | Tensor:
    """Number of routable tokens that a stage keeps: max(1, round-half-up(keep * present)), and 0 if none is present.

    Args:
        present: routable tokens entering the stage, an int or an int64 tensor of any shape (one count per row).
        keep: fraction kept, in (0, 1].

    Returns:
        The number, of the same type and shape as ``present``.

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
    """Inputs of a count rule besides ``present`` and ``keep``.

    Attributes:
        original: routable tokens before the first stage.
        index: index of the stage among the stages of its stack, from 0.
        stages: number of stages of its stack.
        least: tokens that always stay, 0 for a stage around a layer.
    """

    original: int | Tensor
    index: int
    stages: int = 1
    least: int = 1


# (present, keep, stage) -> routable tokens that leave the stage, a merger's fused token included
CountRule = Callable[[int | Tensor, float, StageCount], int | Tensor]


def _round_half_up(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    return tokens_kept(present, keep)


def _dynamicvit(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """int(n0 * keep^(stage + 1)), counted from the tokens before the first stage (DynamicViT, arXiv 2106.02034)."""
    fraction = keep ** (stage.index + 1)
    if isinstance(stage.original, Tensor):
        return at_most(torch.floor(stage.original.double() * fraction + 1e-9).long().clamp(min=1), present)
    return at_most(max(1, math.floor(stage.original * fraction + 1e-9)), present)


def cosine_keep(keep: float, index: int, stages: int) -> float:
    """½ cos(π · index ÷ (stages − 1)) + keep, limited to [0, 1]: high in the first layers, low in the last, ``keep`` on average
    (p-MoD, arXiv 2412.04449)."""
    return min(1.0, max(0.0, 0.5 * math.cos(math.pi * index / max(1, stages - 1)) + keep))


def _cosine(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """``tokens_kept`` of ``cosine_keep``; where that is 0, the least."""
    of_stage = cosine_keep(keep, stage.index, stage.stages)
    return tokens_kept(present, of_stage) if of_stage > 1e-9 else at_most(present, stage.least)


def linear_keep(keep: float, index: int, stages: int) -> float:
    """1 over the first fifth of the stages, then on a straight line to ``keep`` at the last one (SpAtten, arXiv 2012.09852)."""
    last, begin = stages - 1, round(0.2 * (stages - 1))
    return keep if index >= last else 1 - (1 - keep) * max(0, index - begin) / (last - begin)


def _linear(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """``linear_keep`` of the tokens before the first stage, at most those that are present."""
    return at_most(tokens_kept(stage.original, linear_keep(keep, stage.index, stage.stages)), present)


def _evit(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """ceil(n * keep) tokens, and one fused from the others (EViT, arXiv 2202.07800)."""
    if isinstance(present, Tensor):
        return torch.minimum(torch.ceil(present.double() * keep - 1e-9).long() + 1, present)
    return min(present, math.ceil(present * keep - 1e-9) + 1)


def _half(present: int | Tensor, keep: float, stage: StageCount) -> int | Tensor:
    """``tokens_kept``, but at least half: matching in pairs cannot remove more (ToMe, arXiv 2210.09461)."""
    return at_least_half(present, tokens_kept(present, keep))


def at_least_half(present: int | Tensor, count: int | Tensor) -> int | Tensor:
    """The larger of ``count`` and the larger half of ``present``."""
    if isinstance(present, Tensor):
        return torch.maximum(torch.as_tensor(count, device=present.device), present - present // 2)
    return max(int(count), present - present // 2)


def at_most(count: int | Tensor, most: int | Tensor) -> int | Tensor:
    """The smaller of two numbers, each of them one for all rows or one a row."""
    if isinstance(count, Tensor):
        return torch.minimum(count, most) if isinstance(most, Tensor) else count.clamp(max=most)
    return most.clamp(max=count) if isinstance(most, Tensor) else min(count, most)


def share_of(rule: str, keep: float, index: int, stages: int, around: bool) -> float:
    """The fraction of the routable tokens at a stage that a rule keeps, before it is a whole number of tokens; ``keep`` itself of rules
    that do not change it over depth.

    Args:
        rule: name of the rule.
        keep: keep of all stages of the stack.
        index: index of the stage among them.
        stages: number of them.
        around: the stages are around layers, so that every one sees all tokens.
    """
    if rule == "cosine":
        return cosine_keep(keep, index, stages)
    if rule == "dynamicvit":
        return keep ** (index + 1) if around else keep
    if rule == "linear":
        before = 1.0 if around or index == 0 else linear_keep(keep, index - 1, stages)
        return linear_keep(keep, index, stages) / before
    return keep


COUNT_RULES: dict[str, CountRule] = {
    "round": _round_half_up,
    "dynamicvit": _dynamicvit,
    "evit": _evit,
    "half": _half,
    "cosine": _cosine,
    "linear": _linear,
}
