"""Rows that cannot be trained on: named, counted, and left out of batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class BadRow(NamedTuple):
    """A row that cannot be trained on. A tuple, since it travels in a batch, and Lightning rebuilds what batches hold.

    Attributes:
        index: row of the split.
        reason: what is wrong with it, the same words for the same kind of fault.
    """

    index: int
    reason: str


class BadRows(ValueError):
    """More rows are bad than ``data.max_bad_fraction`` allows."""


@dataclass
class BadRowCount:
    """Counts bad rows by reason and stops the run past a fraction.

    Attributes:
        allowed: fraction of the rows that may be bad, of those seen or of ``expected``, whichever are more.
        expected: rows that are still to come, so that one early bad row is not taken for a high share.
        seen: rows seen.
        reasons: bad rows by reason.
        first: index of the first row of each reason.
    """

    allowed: float
    expected: int = 0
    seen: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, rows: int, bad: list[BadRow]) -> None:
        """Counts ``rows`` rows, of which ``bad`` were bad. Raises BadRows past the allowed fraction."""
        self.seen += rows
        for row in bad:
            self.reasons[row.reason] = self.reasons.get(row.reason, 0) + 1
            self.first.setdefault(row.reason, row.index)
        if sum(self.reasons.values()) > self.allowed * max(self.seen, self.expected):
            raise BadRows(
                f"bad rows in the data: {self.summary()}; fix them, or allow a share with data.max_bad_fraction (now {self.allowed})"
            )

    def summary(self) -> str:
        """``3 of 128: 2 undecodable image (first row 17), …``."""
        named = ", ".join(f"{number} × {reason} (first at row {self.first[reason]})" for reason, number in self.reasons.items())
        return f"{sum(self.reasons.values())} of {self.seen} rows: {named}" if named else f"0 of {self.seen} rows"


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the good items; ``bad`` lists the BadRow of the others and ``rows`` counts the rows of the data behind them all.

    Tensors of the items are stacked, those of different lengths with zeros behind, and numbers summed. An item is one row, unless its
    ``rows`` says otherwise.
    """
    good = [item for item in items if "bad" not in item]
    bad = [item["bad"] for item in items if "bad" in item]
    batch: dict[str, Any] = {}
    for key in good[0] if good else ():
        values = [item[key] for item in good]
        batch[key] = sum(values) if isinstance(values[0], int) else _side_by_side(values)
    return batch | {"bad": bad, "rows": sum(item.get("rows", 1) for item in items)}


def _side_by_side(values: list[torch.Tensor]) -> torch.Tensor:
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
