"""Settings of RandAugment; ``augmentation.py`` applies them."""

from __future__ import annotations

from dataclasses import dataclass

STRONGEST = 10.0


@dataclass(frozen=True)
class RandomAugment:
    """RandAugment (arXiv 1909.13719): operations drawn evenly from a list, all at one magnitude.

    Attributes:
        operations: applied one after the other to every image.
        magnitude: 0 leaves images as they are (but for the operations that have no strength), 10 is the strongest.
    """

    operations: int = 2
    magnitude: float = 9.0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where a recipe holds one

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ValueError(f"data.random_augment.operations = {self.operations} must be at least 1; leave random_augment out for none")
        if not 0 <= self.magnitude <= STRONGEST:
            raise ValueError(f"data.random_augment.magnitude = {self.magnitude} must be from 0 to {STRONGEST:g}")
