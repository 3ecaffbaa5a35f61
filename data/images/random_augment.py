"""Settings of RandAugment; ``augmentation.py`` applies them."""

from __future__ import annotations

from dataclasses import dataclass

STRONGEST = 10.0


@dataclass(frozen=True)
class RandomAugment:
    """RandAugment (arXiv 1909.13719): random operations of equal probability, all at one magnitude.

    Attributes:
        operations: number of operations applied to every image in turn.
        magnitude: 0 (no change, except for operations without a strength) to 10 (strongest).
    """

    operations: int = 2
    magnitude: float = 9.0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where a recipe holds one

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ValueError(f"data.random_augment.operations = {self.operations} must be at least 1; data.random_augment=null is off")
        if not 0 <= self.magnitude <= STRONGEST:
            raise ValueError(f"data.random_augment.magnitude = {self.magnitude} must be from 0 to {STRONGEST:g}")
