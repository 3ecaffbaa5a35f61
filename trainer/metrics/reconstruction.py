"""Reconstruction error, of masked-image pretraining. By hand: it is the model's own loss, which has been computed already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .quality import Quality


@dataclass
class Reconstruction(Quality):
    """Mean squared error of the hidden patches' pixels, as the model's own loss counts it.

    Attributes:
        total: of the images' errors.
        images: seen.
    """

    total: float = 0.0
    images: int = 0

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        # Every image hides as many patches, so that the mean over a batch is a mean over its images.
        number = len(batch["pixel_values"])
        self.total, self.images = self.total + float(out.loss) * number, self.images + number

    def merge(self, other: Reconstruction) -> None:
        self.total, self.images = self.total + other.total, self.images + other.images

    @property
    def value(self) -> float:
        return self.total / max(1, self.images)
