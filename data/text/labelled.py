"""Splits of texts with one label each: the embedded passages, or any data set of Hugging Face ``datasets``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..embedded.python_passages import PACKAGES, PassageRows, library_texts
from ..hub import check_columns, label_column, open_splits
from ..labels.classes import KnownClasses, Labels, read_labels
from ..loader import BucketedBatches, StepBatches
from ..rows import BadRow, BadRowCount, BadRows
from ..source import DataSource, SplitNames
from ..splits import Splits
from .columns import SHOWN, find_columns

# Makes or loads a tokenizer; the argument is the training texts.
TokenizerOf = Callable[[Iterable[str]], Any]


@dataclass(frozen=True, kw_only=True)
class LabelledText(Splits):
    """Splits of labelled texts.

    Attributes:
        tokenizer: tokenizer of the texts.
        length: tokens of the longest row.
        counted: bad rows found when the splits were opened; the splits do not contain them.
    """

    tokenizer: Any
    length: int
    counted: BadRowCount

    def train_batches(self, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> StepBatches:
        lengths: torch.Tensor = self.train.lengths  # type: ignore[attr-defined]
        return BucketedBatches(lengths, batch_size, batches, seed, rank, world_size)

    def bad_rows(self, allowed: float) -> BadRowCount:
        return copy.deepcopy(self.counted)

    def save_beside(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set.

    Attributes:
        text: column with the texts; None finds it.
        second: column with the second text of each pair; None if rows are single texts.
        label: column with the labels; None finds it.
        num_labels: number of classes; None counts them.
    """

    text: str | None = None
    second: str | None = None
    label: str | None = None
    num_labels: int | None = None


def passages(train_rows: int, eval_rows: int, length: int, tokenizer_of: TokenizerOf, seed: int) -> LabelledText:
    """Splits of the embedded passages; the run's seed does not change validation and test rows.

    Args:
        train_rows: number of training rows.
        eval_rows: number of validation rows, and of test rows.
        length: tokens of the longest row.
        tokenizer_of: makes or loads the tokenizer, which must add a first and a last token to every row.
        seed: seed of the training rows.
    """
    texts = {split: library_texts(split) for split in ("train", "validation", "test")}
    train = texts["train"]
    tokenizer = tokenizer_of([*(text for package in train.packages for text in package), *train.around])
    frame = frame_of(tokenizer)

    def rows(split: str, number: int, draws: int) -> PassageRows:
        packages, around = ([_ids(tokenizer, part) for part in texts[split].packages], _ids(tokenizer, texts[split].around))
        return PassageRows(packages, around, frame, number, length, draws)

    return LabelledText(
        train=rows("train", train_rows, seed + 2),
        validation=rows("validation", eval_rows, 0),
        test=rows("test", eval_rows, 1),
        classes=list(PACKAGES),
        tokenizer=tokenizer,
        length=length,
        counted=BadRowCount(0.0, train_rows),
    )


def frame_of(tokenizer: Any) -> tuple[int, int]:
    """First and last token id that the tokenizer adds to every row. Raises ValueError if it does not add both."""
    whole, bare = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    if len(whole) != len(bare) + 2 or whole[1:-1] != bare:
        raise ValueError(
            f"the tokenizer encodes 'x' as {tokenizer.convert_ids_to_tokens(whole)}: an encoder needs a first token, [CLS], and a last, "
            "[SEP]; set data.tokenizer to the tokenizer of an encoder"
        )
    return whole[0], whole[-1]


def _ids(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """(tokens,) int32 token ids of the concatenated texts."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(ids, np.int32) for ids in encoded])


def hub_labelled_text(
    source: DataSource,
    names: SplitNames,
    columns: Columns,
    length: int,
    tokenizer_of: TokenizerOf,
    max_bad_fraction: float,
    known: KnownClasses | None = None,
) -> LabelledText:
    """Splits of any data set of Hugging Face ``datasets`` with one column of texts and one of labels.

    Args:
        source: name and files of the data set.
        names: names of the splits.
        columns: names of the columns.
        length: tokens of the longest row.
        tokenizer_of: makes or loads the tokenizer.
        max_bad_fraction: allowed share of bad rows.
        known: classes of the model that is evaluated or continues to train; None if it has none.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message lists the existing ones.
        BadRows: the share of bad rows exceeds ``max_bad_fraction``.
    """
    import datasets

    datasets.disable_progress_bars()
    train, validation, test = open_splits(source, names)
    label = label_column(train.features, columns.label)
    text, note = _text_column(train, columns, label)
    if columns.second is not None and columns.second not in train.column_names:
        raise ValueError(
            f"data.second_text_column = {columns.second!r} is missing from the data: its columns are {', '.join(train.column_names)}"
        )
    texts = [text] if columns.second is None else [text, columns.second]
    opened = {"train": train, "validation": validation} | ({} if test is None else {"test": test})
    check_columns(opened, [*texts, label])
    # Without a split for validation its rows were taken from the training rows, and their classes with them.
    labels = read_labels(opened, label, ("train", "validation") if names.validation is None else ("train",), columns.num_labels, known)
    tokenizer = tokenizer_of(value for name in texts for value in train[name] if isinstance(value, str))
    frame_of(tokenizer)
    counted = BadRowCount(max_bad_fraction, sum(map(len, opened.values())))
    read = {split: _read(rows, texts, labels, split, tokenizer, length, counted) for split, rows in opened.items()}
    return LabelledText(
        train=read["train"],
        validation=read["validation"],
        test=read["validation" if test is None else "test"],
        classes=labels.classes,
        has_test=test is not None,
        counts=labels.counts,
        notes=(note,),
        tokenizer=tokenizer,
        length=length,
        counted=counted,
    )


def _text_column(rows: Any, columns: Columns, label: str) -> tuple[str, str]:
    """Name of the column of texts, and a note that says how it was found."""
    others = [name for name in rows.column_names if name not in (label, columns.second)]
    found = find_columns(others, rows.features, [rows[row] for row in range(min(SHOWN, len(rows)))], columns.text, plain=True)
    assert found.text is not None
    return found.text, found.note


def _read(rows: Any, texts: list[str], labels: Labels, split: str, tokenizer: Any, length: int, counted: BadRowCount) -> TextRows:
    """Encodes a split (``datasets`` caches the result beside the split if it is on disk) and removes bad rows.

    Raises:
        BadRows: the share of bad rows of this split exceeds the allowed one, or every row is bad.
    """
    encoded = rows.map(
        _encode, batched=True, fn_kwargs={"tokenizer": tokenizer, "texts": texts, "length": length}, remove_columns=rows.column_names
    )
    bad = {**labels.bad[split], **{row: reason for row, reason in enumerate(encoded["bad"]) if reason}}
    counted.add_split(split, len(rows), [BadRow(row, bad[row]) for row in sorted(bad)])
    lengths = np.asarray(encoded["tokens"], np.int64)
    good = np.asarray([row for row in range(len(rows)) if row not in bad], np.int64)
    if not len(good):
        raise BadRows(f"every row of the split for {split} is bad: {counted.summary()}")
    # Without shuffling, rows are sorted by length, so that batches need little padding.
    order = good if split == "train" else good[np.argsort(lengths[good], kind="stable")]
    return TextRows(encoded, order, labels.numbers[split], lengths)


def _encode(rows: Mapping[str, Sequence[Any]], tokenizer: Any, texts: list[str], length: int) -> dict[str, list[Any]]:
    columns = [rows[name] for name in texts]
    bad = [next((reason for value in row if (reason := _wrong(value))), "") for row in zip(*columns, strict=True)]
    # A bad row is encoded as a space, so that row numbers do not shift.
    clean = [[" " if wrong else value for value, wrong in zip(column, bad, strict=True)] for column in columns]
    ids = tokenizer(*clean, truncation=True, max_length=length, return_token_type_ids=True)
    return {
        "input_ids": ids["input_ids"],
        "token_type_ids": ids["token_type_ids"],
        "tokens": [len(row) for row in ids["input_ids"]],
        "bad": bad,
    }


def _wrong(value: Any) -> str:
    if not isinstance(value, str):
        return "missing text" if value is None else f"{type(value).__name__} in place of a text"
    return "" if value.strip() else "empty text"


class TextRows(Dataset[dict[str, Any]]):
    """Encoded texts of a Hugging Face data set. Index i is row i % n of epoch i // n.

    Args:
        encoded: data set with ``input_ids`` and ``token_type_ids``.
        order: (n,) int64 row numbers of ``encoded``, in the order of this split.
        labels: int64 label of every row of ``encoded``.
        lengths: int64 tokens of every row of ``encoded``.

    An item has ``input_ids``, ``token_type_ids`` and ``attention_mask`` (tokens,), ``labels`` and ``sample_ids``.
    """

    def __init__(self, encoded: Any, order: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
        self.encoded, self.order, self.labels = encoded, order, labels
        self.lengths = torch.from_numpy(lengths[order])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.order[index % len(self)])
        item = self.encoded[row]
        ids = torch.tensor(item["input_ids"])
        return {
            "input_ids": ids,
            "token_type_ids": torch.tensor(item["token_type_ids"]),
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor(int(self.labels[row])),
            "sample_ids": torch.tensor(index),
            # Data rows were counted when they were encoded.
            "rows": 0,
        }
