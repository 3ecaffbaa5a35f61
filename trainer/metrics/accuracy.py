"""Accuracy of image and text classifiers.

torchmetrics counts. The division is done here in float64, because torchmetrics divides in float32: a report would show
0.8765000104904175 for 0.8765.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchmetrics.functional.classification import multiclass_stat_scores

from ...data.labels.classes import occurring_only
from ...data.splits import Splits
from .quality import Quality, mean


@dataclass
class Accuracy(Quality):
    """Share of correct answers.

    Attributes:
        right: number of correct answers.
        seen: number of answers.
        labels: number of labels of each class.
    """

    right: int = 0
    seen: int = 0
    labels: Counter[int] = field(default_factory=Counter)

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        logits, labels = out.logits, batch["labels"]
        scores = multiclass_stat_scores(logits, labels, num_classes=logits.shape[-1], average="micro", validate_args=False)
        # Summed over classes: true positives, false positives, true negatives, false negatives, rows.
        right, _, _, _, seen = scores.tolist()
        self.right, self.seen = self.right + right, self.seen + seen
        self.labels.update(labels.tolist())

    def merge(self, other: Accuracy) -> None:
        self.right, self.seen = self.right + other.right, self.seen + other.seen
        self.labels.update(other.labels)

    @property
    def value(self) -> float:
        return mean(self.right, self.seen, "label")

    def details(self, data: Splits) -> dict[str, Any]:
        return {"labels": {name: self.labels[code] for code, name in enumerate(data.classes)}}

    def remarks(self, data: Splits) -> list[str]:
        line = occurring_only("accuracy", data.classes, [self.labels[code] for code in range(len(data.classes))])
        return [] if line is None else [line]
