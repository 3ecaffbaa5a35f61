"""Reconstruction error of masked-image pretraining. Not from torchmetrics: it is the model's own loss, which is computed already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .quality import Quality, mean


@dataclass
class Reconstruction(Quality):
    """Mean squared error of the hidden patches' pixels, as in the model's own loss.

    Attributes:
        total: sum of the images' errors.
        images: number of images.
    """

    total: float = 0.0
    images: int = 0

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        # Every image hides equally many patches, so the mean over a batch is the mean over its images.
        number = len(batch["pixel_values"])
        self.total, self.images = self.total + float(out.loss) * number, self.images + number

    def merge(self, other: Reconstruction) -> None:
        self.total, self.images = self.total + other.total, self.images + other.images

    @property
    def value(self) -> float:
        return mean(self.total, self.images, "image")
