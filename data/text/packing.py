"""Documents packed into rows of equal length, without attention between documents.

``position_ids`` start at 0 in every document of a row; transformers derives the borders of documents from them and restricts
attention to each token's own document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
        length: tokens of a row; a multiple of ``bag``.
        filler: token id of padding.
        sizes: (entries,) int64 bytes of text by token id.
        bag: consecutive tokens that a model reads as one, for rows of bags; None for rows of tokens. No bag has tokens of two documents:
            a document begins a bag, and its last one may be filled with padding.
    """

    length: int
    filler: int
    sizes: np.ndarray
    bag: int | None = None

    def with_bags(self, bag: int) -> Tokens:
        """The same for rows of as many bags of ``bag`` tokens as these rows have tokens."""
        return replace(self, length=self.length * bag, bag=bag)

    @property
    def grain(self) -> int:
        """Tokens at whose multiples a document may begin."""
        return self.bag or 1

    def row(self, parts: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> dict[str, Any]:
        """A packed row.

        Args:
            parts: (n,) token ids of a document or a part of one, and (n,) bool learned tokens (None: all are learned).

        Returns:
            ``input_ids``, ``labels`` (IGNORE_TOKEN at the first token of a part, which has no predecessor), ``position_ids`` (0 … in each
            part), ``documents`` (0 … by part, PADDING in padding), all (length,) int64; and the integers ``bytes`` (of the predicted
            text), ``tokens`` (without padding) and ``predicted`` (number of predicted tokens).

            Of bags: ``input_ids`` and ``labels`` are (length / bag, bag), and the first bag of a part is not predicted;
            ``position_ids`` and ``documents`` are (length / bag,) and count bags.
        """
        grain = self.grain
        ids = np.full(self.length, self.filler, np.int64)
        labels = np.full(self.length, IGNORE_TOKEN, np.int64)
        positions, documents = np.zeros(self.length, np.int64), np.full(self.length, PADDING, np.int64)
        start, number_of_tokens = 0, 0
        for number, (tokens, learned) in enumerate(parts):
            stop = start + len(tokens)
            ids[start:stop] = tokens
            labels[start:stop] = tokens if learned is None else np.where(learned, tokens, IGNORE_TOKEN)
            labels[start : start + grain] = IGNORE_TOKEN
            positions[start:stop] = np.arange(len(tokens)) // grain
            documents[start:stop] = number
            start = up_to(stop, grain)
            number_of_tokens += len(tokens)
        if self.bag is not None:
            ids, labels = ids.reshape(-1, grain), labels.reshape(-1, grain)
            positions, documents = positions[::grain].copy(), documents[::grain].copy()
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "documents": documents}
        predicted = labels[labels != IGNORE_TOKEN]
        # A model's vocabulary may be larger than its tokenizer's.
        counted = int(self.sizes[predicted[predicted < len(self.sizes)]].sum())
        return {key: torch.from_numpy(value) for key, value in arrays.items()} | {
            "bytes": counted,
            "tokens": number_of_tokens,
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


def up_to(number: int, grain: int) -> int:
    """The next multiple of ``grain``, ``number`` itself if it is one."""
    return -(-number // grain) * grain


def cut_end_to_end(corpus: Corpus, length: int, grain: int = 1) -> Plan:
    """All tokens in order, cut into full rows: the rest of a document continues in the next row, as a separate document.

    Args:
        corpus: the documents.
        length: tokens of a row, a multiple of ``grain``.
        grain: tokens at whose multiples a document begins.
    """
    # In grains: a document's last one may be incomplete.
    first = np.concatenate([[0], np.cumsum(-(-np.diff(corpus.starts) // grain))]).astype(np.int64)
    rows = np.arange(0, first[-1], length // grain)
    start = np.union1d(first[:-1][np.diff(first) > 0], rows)
    document = np.searchsorted(first, start, "right") - 1
    begin, last = corpus.starts[document] - first[document] * grain, corpus.starts[document + 1]
    stop = np.minimum(begin + np.append(start[1:], first[-1]) * grain, last)
    return Plan(np.append(np.searchsorted(start, rows), len(start)), begin + start * grain, stop)


def keep_whole(corpus: Corpus, length: int, grain: int = 1) -> Plan:
    """Uncut documents, longest first, each in the row that it fills best (best-fit decreasing, arXiv 2404.10830).

    Args:
        corpus: documents of at most ``length`` tokens.
        length: tokens of a row, a multiple of ``grain``.
        grain: tokens at whose multiples a document begins.
    """
    sizes = -(-np.diff(corpus.starts) // grain) * grain
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
        tokens: length and token ids of the rows.
        whole: if True, documents are not cut; otherwise they continue in the next row.
    """

    def __init__(self, corpus: Corpus, tokens: Tokens, whole: bool) -> None:
        self.corpus, self.tokens, self.whole = corpus, tokens, whole
        self.plan: Plan = (keep_whole if whole else cut_end_to_end)(corpus, tokens.length, tokens.grain)

    def with_bags(self, bag: int) -> PackedRows:
        """The same documents in rows of bags."""
        return PackedRows(self.corpus, self.tokens.with_bags(bag), self.whole)

    @property
    def predicted(self) -> int:
        """Tokens that an epoch can predict: every part without its first bag, which has no predecessor. Prompts count as text."""
        return int(np.maximum(self.plan.stop - self.plan.start - self.tokens.grain, 0).sum())

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
        tokens: from the number of a row to its length and token ids.
        whole: if True, documents are not cut; otherwise they continue in the next row.
    """

    def __init__(self, tokens: Callable[[int], Tokens], whole: bool) -> None:
        self.tokens_of, self.tokens, self.whole = tokens, tokens(0), whole
        self._taken = 0
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
            self._filled = up_to(self._filled + len(self._parts[-1][0]), self.tokens.grain)
            tokens, learned = tokens[room:], None if learned is None else learned[room:]
            if self._filled == self.tokens.length:
                yield self._take()

    def _take(self) -> dict[str, Any]:
        row = self.tokens.row(self._parts)
        self._parts, self._filled = [], 0
        self._taken += 1
        self.tokens = self.tokens_of(self._taken)
        return row
