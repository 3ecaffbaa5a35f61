"""The metric of classifiers, whatever they classify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .quality import Quality


@dataclass
class Accuracy(Quality):
    """Share of right answers.

    Attributes:
        right: answers.
        seen: answers in all.
    """

    right: int = 0
    seen: int = 0

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        self.right += int((out.logits.argmax(-1) == batch["labels"]).sum())
        self.seen += len(batch["labels"])

    def merge(self, other: Accuracy) -> None:
        self.right, self.seen = self.right + other.right, self.seen + other.seen

    @property
    def value(self) -> float:
        return self.right / max(1, self.seen)
