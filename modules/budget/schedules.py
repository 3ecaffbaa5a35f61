"""Schedules: the course of a value from its start to its end over training, one pure function each."""

from __future__ import annotations

import math
from collections.abc import Callable

# start, end, progress in [0, 1] -> value
Schedule = Callable[[float, float, float], float]


def constant(start: float, end: float, progress: float) -> float:
    """The end value at every step."""
    return end


def linear(start: float, end: float, progress: float) -> float:
    """A straight line from start to end."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from start to end: end + (start - end)·½(1 + cos(π·progress)), as the warm-up of MoR (arXiv 2507.10524)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def reciprocal(start: float, end: float, progress: float) -> float:
    """1 ÷ value on a straight line: the compression factor grows evenly, from 1 to 8 times for example (DMS, arXiv 2506.05345)."""
    return 1 / (1 / start + (1 / end - 1 / start) * progress)


def step(start: float, end: float, progress: float) -> float:
    """The start value, then all at once the end value: to recover at full length, from 0.5 to 1 for example."""
    return end if progress >= 1 else start


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine, "reciprocal": reciprocal, "step": step}


def staircase(value: float, start: float, increment: float) -> float:
    """``value`` rounded to a multiple of ``increment`` towards ``start``, and never beyond ``start``.

    With a linear schedule it is that of random-LTD (arXiv 2211.11586), v - v mod increment.
    """
    # The small constant corrects rounding errors of values that should be exact multiples.
    stair = math.floor(value / increment + 1e-9) if value >= start else math.ceil(value / increment - 1e-9)
    reached = stair * increment
    return max(reached, start) if value >= start else min(reached, start)


def progress(step: int, until: float, total_steps: int, begin: float = 0.0) -> float:
    """How far ``step`` is from ``begin`` · ``total_steps`` to ``until`` · ``total_steps``, limited to [0, 1]."""
    first, steps = begin * total_steps, (until - begin) * total_steps
    return float(step >= first) if steps <= 0 else min(1.0, max(0.0, (step - first) / steps))
