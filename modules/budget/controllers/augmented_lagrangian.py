"""Augmented Lagrangian: a penalty, and a multiplier that sums the gaps up until there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Controller, check_pulls


@dataclass(frozen=True)
class AugmentedLagrangian(Controller):
    """μ·h + ½·c·h² for a gap h; after each step μ ← μ + rate·h (Hestenes 1969, Powell 1969).

    The same as proportional-integral control: the multiplier moves until the achieved value is the requested one, whatever the task pulls
    towards, and the penalty damps the swings that a multiplier alone would have. The penalty c grows by ``growth`` each time that, over
    ``every`` steps, the mean gap has not shrunk to ``shrink`` of what it was and is above ``tolerance``. The weight of a regularizer that
    holds the ratio grows as c does, unless its ``grows`` is False.

    Attributes:
        rate: step of the multiplier for each unit of the gap.
        penalty: c at the start.
        growth: factor on c; 1 keeps it.
        shrink: share of its size to which the mean gap has to shrink within ``every`` steps.
        every: steps between two comparisons.
        tolerance: mean gap below which the penalty stays.
        highest: bound of the multiplier's size, and of c.
    """

    pace = "rate"
    rate: float = 0.1
    penalty: float = 10.0
    growth: float = 1.2
    shrink: float = 0.8
    every: float = 20
    tolerance: float = 0.005
    highest: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.growth < 1:
            raise ValueError(
                f"budget.controller: growth = {self.growth} must be at least 1: the penalty grows where the gap does not shrink"
            )
        check_pulls(self, "rate", "penalty")

    def start(self, device: torch.device) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return {"multiplier": zero, "penalty": zero + self.penalty, "sum": zero, "before": zero + torch.inf, "steps": zero}

    def weight(self, state: Mapping[str, Tensor]) -> Tensor | float:
        return state["penalty"] / self.penalty if self.penalty else 1.0

    def loss(self, gap: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return state["multiplier"].to(gap.dtype) * gap + 0.5 * state["penalty"].to(gap.dtype) * gap.square()

    def update(self, gap: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        multiplier = (state["multiplier"] + self.rate * gap).clamp(-self.highest, self.highest)
        summed, steps = state["sum"] + gap, state["steps"] + 1
        # No branch on values: they are on the device, and a step must not wait for it.
        compared = steps >= self.every
        mean = (summed / steps).abs()
        stays = compared & (mean > self.shrink * state["before"]) & (mean > self.tolerance)
        penalty = torch.where(stays, (state["penalty"] * self.growth).clamp(max=max(self.highest, self.penalty)), state["penalty"])
        return {
            "multiplier": multiplier,
            "penalty": penalty,
            "sum": torch.where(compared, 0.0, summed),
            "before": torch.where(compared, mean, state["before"]),
            "steps": torch.where(compared, 0.0, steps),
        }
