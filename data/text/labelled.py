"""Splits of texts with a label each: the embedded passages, and any data set of Hugging Face ``datasets``."""

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
from ..hub import class_names, label_codes, label_column, open_splits
from ..loader import BucketedBatches, StepBatches
from ..rows import BadRow, BadRowCount
from ..source import DataSource, SplitNames
from ..splits import Splits
from .documents import text_column

# From the training texts to the tokenizer.
TokenizerOf = Callable[[Iterable[str]], Any]


@dataclass(frozen=True, kw_only=True)
class LabelledText(Splits):
    """Splits of labelled texts.

    Attributes:
        tokenizer: of the tokens.
        length: of the longest row.
        counted: bad rows that were found when the splits were opened; none of them is in a split.
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
    """Which columns of a data set are read.

    Attributes:
        text: with the texts; None finds it.
        second: with texts that stand behind those, a pair each; None has none.
        label: with the labels; None finds it.
        num_labels: how many there are; None counts them.
    """

    text: str | None = None
    second: str | None = None
    label: str | None = None
    num_labels: int | None = None


def passages(train_rows: int, eval_rows: int, length: int, tokenizer_of: TokenizerOf, seed: int) -> LabelledText:
    """The embedded texts; rows of validation and test are the same whatever the seed.

    Args:
        train_rows: to train on.
        eval_rows: to validate on, and as many to test.
        length: tokens of the longest row.
        tokenizer_of: makes or loads the tokenizer, which must have a first and a last token for every row.
        seed: of the training rows.
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
    """Token ids that every row begins and ends with. Raises ValueError for a tokenizer that has none."""
    whole, bare = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    if len(whole) != len(bare) + 2 or whole[1:-1] != bare:
        raise ValueError(
            f"the tokenizer writes {tokenizer.convert_ids_to_tokens(whole)} for 'x': an encoder needs a first token, [CLS], and a last one, "
            "[SEP]; set data.tokenizer to that of an encoder"
        )
    return whole[0], whole[-1]


def _ids(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """(tokens,) int32 of texts end to end."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(ids, np.int32) for ids in encoded])


def hub_labelled_text(
    source: DataSource,
    names: SplitNames,
    columns: Columns,
    length: int,
    tokenizer_of: TokenizerOf,
    max_bad_fraction: float,
) -> LabelledText:
    """Any data set of Hugging Face ``datasets`` with a column of texts and one of labels.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message names those there are.
        BadRows: more rows are bad than ``max_bad_fraction``.
    """
    import datasets

    datasets.disable_progress_bars()
    train, validation, test = open_splits(source, names)
    label = label_column(train.features, columns.label)
    classes = class_names(train, label)
    if columns.num_labels is not None and len(classes) != columns.num_labels:
        classes = [str(value) for value in range(columns.num_labels)]
    text = _text_column(train, columns, label)
    if columns.second is not None and columns.second not in train.column_names:
        raise ValueError(
            f"data.second_text_column = {columns.second!r} is missing from the data: its columns are {', '.join(train.column_names)}"
        )
    wanted = [text] if columns.second is None else [text, columns.second]
    tokenizer = tokenizer_of(value for name in wanted for value in train[name] if isinstance(value, str))
    frame_of(tokenizer)
    opened = [rows for rows in (train, validation, test) if rows is not None]
    counted = BadRowCount(max_bad_fraction, sum(map(len, opened)))
    read = {id(rows): _read(rows, wanted, label, classes, tokenizer, length, counted, rows is train) for rows in opened}
    return LabelledText(
        train=read[id(train)],
        validation=read[id(validation)],
        test=read[id(validation if test is None else test)],
        classes=classes,
        has_test=test is not None,
        tokenizer=tokenizer,
        length=length,
        counted=counted,
    )


def _text_column(rows: Any, columns: Columns, label: str) -> str:
    others = [name for name in rows.column_names if name not in (label, columns.second)]
    found = text_column(others, rows.features, columns.text)
    if found is None:
        raise ValueError(f"no column of texts found: set data.text_column to one of {', '.join(others)}")
    return found


def _read(
    rows: Any, texts: list[str], label: str, names: list[str], tokenizer: Any, length: int, counted: BadRowCount, shuffled: bool
) -> TextRows:
    """Encodes a split, which ``datasets`` keeps on disk where the split itself is there, and leaves its bad rows out."""
    encoded = rows.map(
        _encode, batched=True, fn_kwargs={"tokenizer": tokenizer, "texts": texts, "length": length}, remove_columns=rows.column_names
    )
    labels, bad = label_codes(rows[label], names)
    bad |= {row: reason for row, reason in enumerate(encoded["bad"]) if reason}
    counted.add(len(rows), [BadRow(row, bad[row]) for row in sorted(bad)])
    lengths = np.asarray(encoded["tokens"], np.int64)
    good = np.asarray([row for row in range(len(rows)) if row not in bad], np.int64)
    # Where nobody shuffles, neighbours are alike, so that little is padded.
    order = good if shuffled else good[np.argsort(lengths[good], kind="stable")]
    return TextRows(encoded, order, labels, lengths)


def _encode(rows: Mapping[str, Sequence[Any]], tokenizer: Any, texts: list[str], length: int) -> dict[str, list[Any]]:
    columns = [rows[name] for name in texts]
    bad = [next((reason for value in row if (reason := _wrong(value))), "") for row in zip(*columns, strict=True)]
    # A bad row has some text too, so that rows stay where they are.
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
    """Encoded texts of a Hugging Face data set. Index i stands for row i % n of epoch i // n.

    Args:
        encoded: with ``input_ids`` and ``token_type_ids``.
        order: (n,) int64 which of its rows, and in which order.
        labels: int64 of every row.
        lengths: int64 of every row, in tokens.

    An item is ``input_ids``, ``token_type_ids``, ``attention_mask`` (tokens,), ``labels`` and ``sample_ids``.
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
            # Rows of the data were counted when they were read.
            "rows": 0,
        }
