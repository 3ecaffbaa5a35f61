"""νPI: a multiplier under proportional-integral control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Controller, check_pulls


@dataclass(frozen=True)
class NuPI(Controller):
    """μ·h for a gap h, with μ ← μ + integral·h + proportional·(ξ - ξ before) and ξ ← memory·ξ + (1 - memory)·h
    (νPI, arXiv 2406.04558).

    μ moves first: the loss has the one that follows from the gap of the batch at hand, while the state moves once a step, by the mean gap.

    At ``memory`` 0 and ``proportional`` 0 it is gradient ascent on the multiplier, which swings around the target.

    Attributes:
        integral: κ_i, step of the multiplier for each unit of the gap.
        proportional: κ_p, weight of the change of the gap's moving average.
        memory: ν, weight of the past in this average, below 1.
        highest: bound of the multiplier's size.
    """

    pace = "integral"
    integral: float = 0.3
    proportional: float = 20.0
    memory: float = 0.0
    highest: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory >= 1:
            raise ValueError(f"budget.controller: memory = {self.memory} must be in [0, 1): at 1 the average would never move")
        check_pulls(self, "integral", "proportional")

    def start(self, device: torch.device) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return {"multiplier": zero, "average": zero}

    def loss(self, gap: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        # The multiplier moves before the weights do: one that answers to the step before swings.
        return self.update(gap.detach().double(), state)["multiplier"].to(gap.dtype) * gap

    def update(self, gap: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        average = self.memory * state["average"] + (1 - self.memory) * gap
        multiplier = state["multiplier"] + self.integral * gap + self.proportional * (average - state["average"])
        return {"multiplier": multiplier.clamp(-self.highest, self.highest), "average": average}
