"""Documents packed into rows of equal length, without attention between documents.

``position_ids`` start at 0 in every document of a row; transformers derives the borders of documents from them and restricts
attention to each token's own document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...modules.tokens.labels import IGNORE_TOKEN
from .documents import Document

PADDING = -1


@dataclass(frozen=True)
class Tokens:
    """Length and token ids of packed rows.

    Attributes:
        length: tokens of a row.
        filler: token id of padding.
        sizes: (entries,) int64 bytes of text by token id.
    """

    length: int
    filler: int
    sizes: np.ndarray

    def row(self, parts: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> dict[str, Any]:
        """A packed row.

        Args:
            parts: (n,) token ids of a document or a part of one, and (n,) bool learned tokens (None: all are learned).

        Returns:
            ``input_ids``, ``labels`` (IGNORE_TOKEN at the first token of a part, which has no predecessor), ``position_ids`` (0 … in each
            part), ``documents`` (0 … by part, PADDING in padding), all (length,) int64; and the integers ``bytes`` (of the predicted
            text), ``tokens`` (without padding) and ``predicted`` (number of predicted tokens).
        """
        ids = np.full(self.length, self.filler, np.int64)
        labels = np.full(self.length, IGNORE_TOKEN, np.int64)
        positions, documents = np.zeros(self.length, np.int64), np.full(self.length, PADDING, np.int64)
        start = 0
        for number, (tokens, learned) in enumerate(parts):
            stop = start + len(tokens)
            ids[start:stop] = tokens
            labels[start:stop] = tokens if learned is None else np.where(learned, tokens, IGNORE_TOKEN)
            labels[start] = IGNORE_TOKEN
            positions[start:stop] = np.arange(len(tokens))
            documents[start:stop] = number
            start = stop
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}
        predicted = labels[labels != IGNORE_TOKEN]
        # A model's vocabulary may be larger than its tokenizer's.
        counted = int(self.sizes[predicted[predicted < len(self.sizes)]].sum())
        return {key: torch.from_numpy(value) for key, value in arrays.items()} | {
            "bytes": counted,
            "tokens": start,
            "predicted": len(predicted),
        }


class Corpus:
    """Concatenated documents in flat arrays, which may be memory-mapped.

    Args:
        tokens: int32 token ids of all documents, as one or more arrays.
        lengths: (documents,) int64 tokens of each document.
        learned: bool for each token, in arrays as ``tokens``; None if every token is learned.
    """

    def __init__(self, tokens: Sequence[np.ndarray], lengths: np.ndarray, learned: Sequence[np.ndarray] | None = None) -> None:
        self.tokens, self.learned = tokens, learned
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._first = np.concatenate([[0], np.cumsum([len(part) for part in tokens])]).astype(np.int64)

    @property
    def size(self) -> int:
        """Number of tokens of all documents."""
        return int(self.starts[-1])

    def part(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids and learned mask of tokens ``start`` to ``stop`` of the whole corpus."""
        return self._cut(self.tokens, start, stop), None if self.learned is None else self._cut(self.learned, start, stop)

    def _cut(self, arrays: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._first, start, "right")) - 1
        found = []
        while start < stop:
            offset, end = int(self._first[first]), min(stop, int(self._first[first + 1]))
            found.append(arrays[first][start - offset : end - offset])
            start, first = end, first + 1
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True)
class Plan:
    """The tokens of a corpus that each row holds.

    Attributes:
        first: (rows + 1,) int64 number of the first part of each row.
        start: (parts,) int64 first token of each part, counted over the whole corpus.
        stop: (parts,) int64 end of each part, exclusive.
    """

    first: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def cut_end_to_end(corpus: Corpus, length: int) -> Plan:
    """All tokens in order, cut into full rows: the rest of a document continues in the next row, as a separate document."""
    rows = np.arange(0, corpus.size, length)
    start = np.union1d(corpus.starts[:-1][np.diff(corpus.starts) > 0], rows)
    stop = np.append(start[1:], corpus.size)
    return Plan(np.append(np.searchsorted(start, rows), len(start)), start, stop)


def keep_whole(corpus: Corpus, length: int) -> Plan:
    """Uncut documents, longest first, each in the row that it fills best (best-fit decreasing, arXiv 2404.10830).

    Args:
        corpus: documents of at most ``length`` tokens.
        length: tokens of a row.
    """
    sizes = np.diff(corpus.starts)
    order = [int(number) for number in np.argsort(-sizes, kind="stable") if sizes[number]]
    rows: list[list[int]] = []
    # Rows by free tokens, and a bit mask of the free sizes that exist: the lowest bit from ``size`` up is the best fit.
    with_room: dict[int, list[int]] = {}
    rooms = 0
    for number in order:
        size = int(sizes[number])
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(number)
        with_room.setdefault(room - size, []).append(row)
        rooms |= 1 << (room - size)
    counts = np.asarray([len(row) for row in rows], np.int64)
    flat = np.asarray([number for row in rows for number in row], np.int64)
    return Plan(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), corpus.starts[flat], corpus.starts[flat + 1])


class PackedRows(Dataset[dict[str, Any]]):
    """Rows of packed documents. Index i is row i % n of epoch i // n.

    Args:
        corpus: the documents.
        plan: the tokens of each row.
        tokens: length and token ids of the rows.
    """

    def __init__(self, corpus: Corpus, plan: Plan, tokens: Tokens) -> None:
        self.corpus, self.plan, self.tokens = corpus, plan, tokens

    def __len__(self) -> int:
        return len(self.plan.first) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self)
        parts = range(int(self.plan.first[row]), int(self.plan.first[row + 1]))
        cut = [self.corpus.part(int(self.plan.start[part]), int(self.plan.stop[part])) for part in parts]
        # Data rows were counted when they were encoded.
        return self.tokens.row(cut) | {"sample_ids": torch.tensor(index), "rows": 0}


class Packer:
    """Packs the documents of a stream in their order.

    Args:
        tokens: length and token ids of the rows.
        whole: if True, documents are not cut; otherwise they continue in the next row.
    """

    def __init__(self, tokens: Tokens, whole: bool) -> None:
        self.tokens, self.whole = tokens, whole
        self._parts: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._filled = 0

    def add(self, document: Document) -> Iterable[dict[str, Any]]:
        """Rows that this document completes."""
        tokens, learned = document.tokens, document.learned
        if self.whole and self._filled + len(tokens) > self.tokens.length:
            yield self._take()
        while len(tokens):
            room = self.tokens.length - self._filled
            self._parts.append((tokens[:room], None if learned is None else learned[:room]))
            self._filled += len(self._parts[-1][0])
            tokens, learned = tokens[room:], None if learned is None else learned[room:]
            if self._filled == self.tokens.length:
                yield self._take()

    def _take(self) -> dict[str, Any]:
        row = self.tokens.row(self._parts)
        self._parts, self._filled = [], 0
        return row
