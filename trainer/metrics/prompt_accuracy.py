"""Accuracy of short answers to long prompts, by the prompt's length and by where the answer stands in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...data.splits import Splits
from ..losses.answer_loss import AnswerLoss
from .answers import AnswerAccuracy


@dataclass
class PromptAccuracy(AnswerAccuracy):
    """Share of answers that greedy decoding gives exactly.

    An answer counts if each of its tokens is the most likely one given those before, which are then the model's own. Learned tokens of no
    answer (``turns`` -1) count in the loss alone.
    """

    def add(self, out: AnswerLoss, batch: Mapping[str, Any]) -> None:
        of = out.turn >= 0
        counted = replace(out, logits=out.logits[of], right=out.right[of], row=out.row[of], turn=out.turn[of])
        super().add(counted, batch)
        self.tokens += len(out.right) - len(counted.right)

    def details(self, data: Splits) -> dict[str, Any]:
        """Beside the loss, accuracy and number of answers by each part of their kinds' names: the length, and the place."""
        found = super().details(data)
        sums: dict[str, tuple[float, int]] = {}
        for name, counts in found["answers"].items():
            for part in name.split(", "):
                right, total = sums.get(part, (0.0, 0))
                sums[part] = (right + counts["accuracy"] * counts["answers"], total + counts["answers"])
        return found | {"answers": {part: {"accuracy": right / total, "answers": total} for part, (right, total) in sums.items()}}
