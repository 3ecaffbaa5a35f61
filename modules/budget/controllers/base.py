"""Controller: the base class of all controllers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


def check_pulls(controller: Controller, *gains: str) -> None:
    """Raises ValueError if a controller whose multiplier is at most ``highest`` has no gain above 0, or this bound is 0."""
    for names in (gains, ("highest",)):
        if not any(getattr(controller, name) for name in names):
            raise ValueError(
                f"budget.controller: {' and '.join(names)} = 0 leaves it without any pull to the target: raise {' or '.join(names)}, or take "
                "controller 'fixed' with a regularizer"
            )


@dataclass(frozen=True)
class Controller:
    """Turns the gap of a constraint into a term of the loss, and moves the state of this constraint after each optimizer step.

    A gap is what was achieved less what was requested: its value counts decisions over all processes, and its gradient says how this count
    moves with the scores (``budget/gaps.py``). The state is a mapping of float64 scalars on the gap's device; a controller reads it and
    returns a new one, so that nothing is held outside of it.

    Attributes:
        pace: name of the option with which the target is reached faster; empty without one.
        least_spread: standard deviation of a stage's scores, in log-odds, below which the budget pushes them apart, so that a step moves the
            count by few tokens; 0 leaves them alone.
    """

    pace: ClassVar[str] = ""
    least_spread: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"budget.controller: {field.name} = {value!r} must be a number of at least 0")

    @property
    def holds(self) -> bool:
        """The controller brings the gap to 0 without a regularizer."""
        return True

    def start(self, device: torch.device) -> dict[str, Tensor]:
        """The state before the first step; ``multiplier`` is part of every state, and is logged."""
        return {"multiplier": torch.zeros((), dtype=torch.float64, device=device)}

    def weight(self, state: Mapping[str, Tensor]) -> Tensor | float:
        """Factor on the weight of the budget's regularizer."""
        return 1.0

    def loss(self, gap: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Scalar: the term of the loss.

        Args:
            gap: scalar, achieved less requested, with gradient.
            state: the state of this constraint.
        """
        raise NotImplementedError

    def update(self, gap: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a step.

        Args:
            gap: float64 scalar, mean gap of the step, detached.
            state: the state in the step.
        """
        raise NotImplementedError
