"""Rows that cannot be used for training: reported by reason, counted, and left out of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..modules.tokens.labels import IGNORE_TOKEN

# What padding holds where 0 would mean something.
_PADDING = {"labels": IGNORE_TOKEN, "turns": -1, "kinds": -1, "documents": -1}


class BadRow(NamedTuple):
    """A row that cannot be used for training. A tuple, because it is part of a batch, and Lightning rebuilds the containers in a batch.

    Attributes:
        index: row of the split.
        reason: description of the fault, with the same words for the same type of fault.
    """

    index: int
    reason: str


class BadRows(ValueError):
    """The share of bad rows exceeds ``data.max_bad_fraction``."""


@dataclass
class BadRowCount:
    """Counts bad rows by reason and stops the run above an allowed share.

    Attributes:
        allowed: allowed share of bad rows, relative to the larger of ``seen`` and ``expected``.
        expected: expected number of rows, so that one early bad row is not a high share.
        split: name of the split for messages; empty if the count is of all data.
        seen: number of rows seen.
        reasons: number of bad rows by reason.
        first: index of the first bad row of each reason.
    """

    allowed: float
    expected: int = 0
    split: str = ""
    seen: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, rows: int, bad: list[BadRow]) -> None:
        """Counts ``rows`` rows, of which ``bad`` are bad. Raises BadRows above the allowed share."""
        self.seen += rows
        for row in bad:
            self.reasons[row.reason] = self.reasons.get(row.reason, 0) + 1
            self.first.setdefault(row.reason, row.index)
        if sum(self.reasons.values()) > self.allowed * max(self.seen, self.expected):
            where = f"the {self.split} data" if self.split else "the data"
            raise BadRows(
                f"bad rows in {where}: {self.summary()}; fix them, or allow a share with data.max_bad_fraction (now {self.allowed})"
            )

    def add_split(self, split: str, rows: int, bad: list[BadRow]) -> None:
        """Counts a whole split, for which the allowed share holds by itself too. Raises BadRows above it."""
        BadRowCount(self.allowed, rows, split).add(rows, bad)
        self.add(rows, bad)

    def summary(self) -> str:
        """``3 of 128 rows: 2 × undecodable image (first at row 17), …``."""
        named = ", ".join(f"{number} × {reason} (first at row {self.first[reason]})" for reason, number in self.reasons.items())
        return f"{sum(self.reasons.values())} of {self.seen} rows: {named}" if named else f"0 of {self.seen} rows"


def good_rows(rows: Any, number: int) -> list[dict[str, Any]]:
    """The first good items of a split, at most ``number``. Raises BadRows if all are bad."""
    found, bad = list[dict[str, Any]](), BadRowCount(1.0)
    for index in range(len(rows)):
        item = rows[index]
        bad.add(1, [item["bad"]] if "bad" in item else [])
        if "bad" not in item:
            found.append(item)
        if len(found) == number:
            break
    if not found:
        raise BadRows(f"every row is bad: {bad.summary()}")
    return found


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the good items, with ``bad``, the BadRow of each bad item, ``rows``, the number of data rows read for all items, and
    ``terms``, the number of values whose mean is the batch's loss.

    Tensors are stacked, and padded at the end if their lengths differ; integers are summed. Tensors of a mapping, what describes the images
    of a row, are joined by name along their first dimension, the others padded with zeros; a batch may have none. An item counts as one
    row unless it has its own ``rows``, and as one term unless it has ``predicted``: a number of tokens or pixels.
    """
    good = [item for item in items if "bad" not in item]
    bad = [item["bad"] for item in items if "bad" in item]
    batch: dict[str, Any] = {}
    for key in good[0] if good else ():
        values = [item[key] for item in good]
        if isinstance(values[0], Mapping):
            names = dict.fromkeys(name for value in values for name in value)
            batch |= {name: joined([value[name] for value in values if name in value]) for name in names}
        else:
            batch[key] = sum(values) if isinstance(values[0], int) else _padded(values, _PADDING.get(key, 0))
    terms = sum(item.get("predicted", 1) for item in good)
    return batch | {"bad": bad, "rows": sum(item.get("rows", 1) for item in items), "terms": terms}


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _padded(values: list[torch.Tensor], filler: int) -> torch.Tensor:
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)


def joined(values: list[torch.Tensor]) -> torch.Tensor:
    """(sum of first sizes, …): tensors one after the other, each other dimension as large as the largest, filled with zeros."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    found = values[0].new_zeros(sum(len(value) for value in values), *largest)
    start = 0
    for value in values:
        found[(slice(start, start + len(value)), *(slice(size) for size in value.shape[1:]))] = value
        start += len(value)
    return found
