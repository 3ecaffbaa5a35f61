"""Accuracy of image and text classifiers.

torchmetrics counts. The division is done here in float64, because torchmetrics divides in float32: a report would show
0.8765000104904175 for 0.8765.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchmetrics.functional.classification import multiclass_stat_scores

from .quality import Quality, mean


@dataclass
class Accuracy(Quality):
    """Share of correct answers.

    Attributes:
        right: number of correct answers.
        seen: number of answers.
    """

    right: int = 0
    seen: int = 0

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        logits, labels = out.logits, batch["labels"]
        scores = multiclass_stat_scores(logits, labels, num_classes=logits.shape[-1], average="micro", validate_args=False)
        # Summed over classes: true positives, false positives, true negatives, false negatives, rows.
        right, _, _, _, seen = scores.tolist()
        self.right, self.seen = self.right + right, self.seen + seen

    def merge(self, other: Accuracy) -> None:
        self.right, self.seen = self.right + other.right, self.seen + other.seen

    @property
    def value(self) -> float:
        return mean(self.right, self.seen, "answers")
