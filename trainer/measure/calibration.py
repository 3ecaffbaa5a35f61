"""From the time of a training step to a ``macs_ratio``, by steps that were measured on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RecipeError


@dataclass(frozen=True)
class Calibration:
    """Times of training steps on one device, and the ``macs_ratio`` that a target in step time stands for there.

    Attributes:
        target: requested time of a step ÷ dense.
        points: ``macs_ratio`` and time of a step ÷ dense of each measured keep, by ``macs_ratio``.
        dense_seconds: median time of a dense step.
        rounds: paired rounds behind the points around the target.
        device: name of the device.
    """

    target: float
    points: tuple[tuple[float, float], ...]
    dense_seconds: float
    rounds: int
    device: str

    @property
    def macs_ratio(self) -> float:
        """``macs_ratio`` of the target."""
        return macs_ratio_at(self.target, self.points)

    @property
    def floor(self) -> float:
        """Time of a step ÷ dense with one token left at each site."""
        return monotone(self.points)[0][1]

    def check(self, start: float = 1.0) -> None:
        """Raises RecipeError if no keep is as fast as the target, or as the value that its schedule starts from."""
        for name, value in (("target", self.target), ("start", start)):
            if value < self.floor:
                raise RecipeError(
                    f"budget.{name} = {value} of the dense step's time cannot be met on {self.device}: with one token left a step still "
                    f"takes {self.floor:.3f}; raise it, move the first stage to an earlier layer, put stages around more layers, or take a "
                    "larger model or batch, whose steps are less overhead"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"points": [list(point) for point in self.points]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """What ``to_dict`` gave."""
        return cls(**{**data, "points": tuple((float(macs), float(time)) for macs, time in data["points"])})


def monotone(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points by their first value, with second values that never fall: those closest to the given ones by least squares (pool adjacent
    violators)."""
    pools: list[list[float]] = []
    for _, value in sorted(points):
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, first), (other, second) = pools[-2:]
            pools[-2:] = [[(one * first + other * second) / (first + second), first + second]]
    fitted = [value for value, number in pools for _ in range(int(number))]
    return [(at, value) for (at, _), value in zip(sorted(points), fitted, strict=True)]


def macs_ratio_at(target: float, points: Sequence[tuple[float, float]]) -> float:
    """The largest ``macs_ratio`` whose step takes at most ``target`` of the dense one, on straight lines between fitted points; the lowest
    measured one if none does, and 1 for a target that every keep meets."""
    fitted = monotone(points)
    within = [place for place, (_, time) in enumerate(fitted) if time <= target]
    if not within:
        return fitted[0][0]
    if within[-1] == len(fitted) - 1:
        return fitted[-1][0]
    (low, fast), (high, slow) = fitted[within[-1]], fitted[within[-1] + 1]
    return low + (high - low) * (target - fast) / (slow - fast)
