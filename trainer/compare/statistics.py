"""Means over seeds, and differences of arms paired by seed, with t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Of the two-sided intervals.
LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its interval.

    Attributes:
        mean: arithmetic mean.
        low: smallest value.
        high: largest value.
        deviation: standard deviation of the values (n - 1); None of one value.
        interval: half of the width of the mean's 95 % interval, by Student's t with n - 1 degrees of freedom; None of one value.
    """

    mean: float
    low: float
    high: float
    deviation: float | None
    interval: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        """The mean of at least one value, which are taken for independent draws of a normal distribution."""
        number = len(values)
        deviation = statistics.stdev(values) if number > 1 else None
        interval = None if deviation is None else t_quantile(number - 1) * deviation / math.sqrt(number)
        return Mean(statistics.mean(values), min(values), max(values), deviation, interval)


def difference(values: Sequence[float], reference: Sequence[float]) -> Mean:
    """The mean difference of two arms whose values are of the same seeds, in the same order.

    What a seed adds to both arms (weights, order of the samples) is not in it, so that the interval is often much narrower than those of
    the arms.
    """
    return Mean.of([mine - its for mine, its in zip(values, reference, strict=True)])


def t_quantile(degrees: int) -> float:
    """Factor on the standard error for a two-sided interval of LEVEL."""
    # scipy is a requirement of scikit-learn.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
