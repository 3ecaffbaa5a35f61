"""Mean intersection over union of semantic segmentation.

torchmetrics counts the confusion matrix. The division is done here in float64, because torchmetrics' Jaccard index divides in float32
and gives 0 to a class that occurs in neither labels nor answers, for which a report has null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ...data.images.splits import ImageData
from ...data.labels.classes import occurring_only
from ...modules.tokens.labels import IGNORE_PIXEL
from .quality import Quality, mean


class MeanIoU(Quality):
    """Intersection over union of each class, over all pixels of all images, and its mean over the classes that occur.

    Attributes:
        confusion: (classes, classes) int64 number of pixels by label and predicted class; None before the first batch.
    """

    def __init__(self) -> None:
        self.confusion: Tensor | None = None

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        logits, labels = out.logits, batch["labels"]
        classes = logits.shape[1]
        found = multiclass_confusion_matrix(logits, labels, num_classes=classes, ignore_index=IGNORE_PIXEL, validate_args=False)
        self._count(found.cpu())

    def merge(self, other: MeanIoU) -> None:
        if other.confusion is not None:
            self._count(other.confusion)

    def _count(self, confusion: Tensor) -> None:
        self.confusion = confusion if self.confusion is None else self.confusion + confusion

    @property
    def per_class(self) -> list[float | None]:
        """Intersection over union by class; None for a class in neither labels nor answers."""
        if self.confusion is None:
            return []
        both = self.confusion.diagonal()
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        return [hit / union if union else None for hit, union in zip(both.tolist(), either.tolist(), strict=True)]

    @property
    def value(self) -> float:
        known = [value for value in self.per_class if value is not None]
        return mean(sum(known), len(known), "labelled pixel")

    @property
    def _labelled(self) -> list[int]:
        """Labelled pixels by class."""
        return [] if self.confusion is None else self.confusion.sum(1).tolist()

    def details(self, data: ImageData) -> dict[str, Any]:
        return {
            "iou": dict(zip(data.classes, self.per_class, strict=False)),
            "labels": dict(zip(data.classes, self._labelled, strict=False)),
        }

    def remarks(self, data: ImageData) -> list[str]:  # type: ignore[override]
        line = occurring_only("mean_iou", data.classes, self._labelled)
        return [] if line is None else [line]
