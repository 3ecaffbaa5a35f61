"""No control: the regularizer alone, with its fixed weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .base import Controller


@dataclass(frozen=True)
class Fixed(Controller):
    """Adds nothing to the regularizer, whose weight is fixed after its ramp.

    A penalty of fixed weight stops where its gradient equals that of the task, so that it misses the target by an amount that depends on
    the task; the other controllers do not.
    """

    least_spread: float = 0.0

    @property
    def holds(self) -> bool:
        return False

    def loss(self, gap: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return gap * 0

    def update(self, gap: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)
