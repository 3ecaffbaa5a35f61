"""The interface of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...data.rows import BadRows
from ...data.splits import Splits


@dataclass(frozen=True, order=True)
class Answered:
    """One answer of an evaluation, so that two models can be compared answer by answer.

    Attributes:
        row: number of the row in its split.
        turn: number of the answer in the row.
        kind: kind of the question; empty if the data have none.
        right: the answer is right.
        tokens: the model's own answer: the most likely tokens, each given the right ones before it.
        question: text of the question.
        reference: text of the right answer.
    """

    row: int
    turn: int
    kind: str
    right: bool
    tokens: tuple[int, ...]
    question: str
    reference: str


class NothingCounted(BadRows):
    """A metric over no row at all; it has no value, above all not a perfect one."""


def mean(total: float, number: float, of: str) -> float:
    """``total`` ÷ ``number``. Raises NothingCounted if there was nothing to count.

    Args:
        total: sum of the values.
        number: number of the values.
        of: what was counted, for the message.
    """
    if not number:
        raise NothingCounted(f"no {of} was counted, so the metric has no value: every row of the split is bad or without labels")
    return total / number


class Quality:
    """A metric in the making: values that are summed over batches and ranks before the final division."""

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        """Counts one batch.

        Args:
            out: output of the model.
            batch: input of the model, on the same device.
        """
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        """Adds the counts of another rank."""
        raise NotImplementedError

    @property
    def value(self) -> float:
        """Value of the metric."""
        raise NotImplementedError

    def details(self, data: Splits) -> dict[str, Any]:
        """Further values of the report's ``quality`` block, JSON-able."""
        return {}

    def remarks(self, data: Splits) -> list[str]:
        """What to know of the value, one line each."""
        return []

    def answered(self, data: Splits) -> list[Answered]:
        """The single answers, by row and turn; empty for metrics of other outputs."""
        return []
