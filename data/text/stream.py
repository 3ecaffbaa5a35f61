"""Streams of ``datasets``, encoded and packed while they are read."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ..rows import BadRow
from ..source import DataSource
from .documents import Encoder
from .files import read_from
from .packing import Packer, Tokens

# Rows encoded in one call of the tokenizer.
_TOGETHER = 64


@dataclass(frozen=True)
class TokensByRow:
    """Length and token ids of the rows of a stream that packs its rows otherwise from some row on.

    Attributes:
        kinds: each way of packing.
        ends: number of the first row that is not packed so, for each of them but the last.
    """

    kinds: tuple[Tokens, ...]
    ends: tuple[int, ...] = ()

    def __call__(self, number: int) -> Tokens:
        """The packing of a row."""
        return self.kinds[bisect.bisect_right(self.ends, number)]


class StreamedRows(Dataset[dict[str, Any]]):
    """Packed rows of an endless stream, numbered from its beginning; it restarts at its end.

    Meant for indices in ascending order: a later index reads all rows before it, and an earlier one restarts the stream. A resumed
    run therefore reads up to its position again. Every process and worker reads the whole stream and keeps its own items, so items do
    not depend on the number of processes.

    Args:
        rows: an ``IterableDataset``, shuffled or not.
        source: its files, for messages.
        encoder: converts its rows to documents.
        tokens: length and token ids of the packed rows.
    """

    def __init__(self, rows: Any, source: DataSource, encoder: Encoder, tokens: TokensByRow) -> None:
        self.rows, self.source, self.encoder, self.tokens = rows, source, encoder, tokens
        self._items: Iterator[list[dict[str, Any]]] | None = None
        self._next = 0

    def with_bags(self, bag: int) -> StreamedRows:
        """The same stream in rows of bags."""
        return self.packed((bag,), ())

    def packed(self, bags: Sequence[int | None], ends: Sequence[int]) -> StreamedRows:
        """The same stream in rows that change their kind.

        Args:
            bags: tokens of a bag, for each kind of rows; None for rows of tokens.
            ends: number of the first row of each kind but the first.
        """
        plain = self.tokens(0)
        kinds = tuple(plain if bag is None else plain.with_bags(bag) for bag in bags)
        return StreamedRows(self.rows, self.source, self.encoder, TokensByRow(kinds, tuple(ends)))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_items": None, "_next": 0}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The packed rows of these numbers, then the bad rows of the data that were read on the way."""
        found, bad = [], []
        for index in indices:
            item, *others = self._take(index)
            found.append(item | {"sample_ids": torch.tensor(index)})
            bad += others
        return found + bad

    def _take(self, index: int) -> list[dict[str, Any]]:
        if self._items is None or index < self._next:
            self._items, self._next = self._read(), 0
        while True:
            items = next(self._items)
            self._next += 1
            if self._next > index:
                return items

    def _read(self) -> Iterator[list[dict[str, Any]]]:
        """Each packed row with the number of data rows read for it, followed by the bad ones among them."""
        packer, epoch, row = Packer(self.tokens, self.encoder.prompts), 0, 0
        read, bad = 0, []
        while True:
            self.rows.set_epoch(epoch)
            before = row
            for batch in read_from(self.source, self.rows.iter(_TOGETHER)):
                for document in self.encoder.texts(batch):
                    read += 1
                    if document.bad:
                        bad.append({"bad": BadRow(row, document.bad), "rows": 0})
                    row += 1
                    for item in packer.add(document):
                        yield [item | {"rows": read}, *bad]
                        read, bad = 0, []
            if row == before:
                raise ValueError("the stream has no rows: check data.data_files and data.train_split")
            epoch += 1
