"""Splits of text: the embedded library, and any data set of Hugging Face ``datasets``, encoded and packed into rows of tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..embedded.python_functions import library_functions
from ..embedded.python_library import library_files
from ..hub import named_splits, open_source, open_splits
from ..loader import StepBatches, StreamBatches
from ..rows import BadRow, BadRowCount
from ..source import DataSource, SplitNames
from ..splits import Splits
from .documents import Encoder, encoder_for, text_column
from .packing import Corpus, PackedRows, Tokens, cut_end_to_end, keep_whole
from .stream import StreamedRows
from .tokenizer import token_bytes

# From the texts of the training split, or None where its rows have prompts, to the tokenizer.
TokenizerOf = Callable[[Iterable[str] | None], Any]
# Rows of a stream that are in memory at once to be shuffled.
SHUFFLED = 1000
# Rows at the beginning of a stream that a tokenizer is trained on.
LOOKED_AT = 100_000


@dataclass(frozen=True)
class TextSettings:
    """How text becomes rows.

    Attributes:
        length: tokens of a row.
        text_column: column with the texts; None finds it.
        sample_by: of the files of the ``text`` builder: what is one document, ``line``, ``paragraph`` or ``document``.
        max_bad_fraction: of the rows of the data.
        held_out: rows of a stream for validation, and as many for test.
        seed: of the order of a stream.
    """

    length: int
    text_column: str | None = None
    sample_by: str = "document"
    max_bad_fraction: float = 0.0
    held_out: int = 2_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TextData(Splits):
    """Splits of text.

    Attributes:
        tokenizer: of the tokens.
        length: of a row.
        counted: bad rows that were found by encoding the splits.
        streamed: the training rows are read as they are needed.
    """

    tokenizer: Any
    length: int
    counted: BadRowCount
    streamed: bool = False

    @property
    def train_rows(self) -> int | None:
        return None if self.streamed else super().train_rows

    def train_batches(self, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> StepBatches:
        if self.streamed:
            return StreamBatches(batch_size, batches, rank, world_size)
        return super().train_batches(batch_size, batches, seed, rank, world_size)

    def bad_rows(self, allowed: float) -> BadRowCount:
        return copy.deepcopy(self.counted)

    def save_beside(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def python_library(train_files: int, eval_files: int, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """The embedded text, a document a file.

    Args:
        train_files: at most so many.
        eval_files: at most so many for validation, and as many for test.
        tokenizer_of: makes or loads the tokenizer.
        settings: how text becomes rows.
    """
    import datasets

    def texts(split: str, limit: int) -> Any:
        return datasets.Dataset.from_dict({"text": list(_library_texts(split, limit))})

    train, validation, test = texts("train", train_files), texts("validation", eval_files), texts("test", eval_files)
    return _in_memory(train, validation, test, tokenizer_of, settings)


def python_functions(train_rows: int, eval_rows: int, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """The embedded prompts and completions: functions up to their docstring, and their bodies. Functions too long for a row are left out.

    Args:
        train_rows: at most so many functions.
        eval_rows: at most so many for validation, and as many for test.
        tokenizer_of: makes or loads the tokenizer; one that is trained learns from the files of ``python_library``.
        settings: how text becomes rows.
    """
    import datasets

    tokenizer = tokenizer_of(_library_texts("train"))

    def rows(split: str, limit: int) -> Any:
        # Whatever the tokenizer adds, something of the body has to fit.
        fitting = (row for row in library_functions(split) if len(tokenizer(row["prompt"])["input_ids"]) <= settings.length - 4)
        return datasets.Dataset.from_list(list(itertools.islice(fitting, limit)))

    splits = rows("train", train_rows), rows("validation", eval_rows), rows("test", eval_rows)
    return _in_memory(*splits, lambda _: tokenizer, settings)


def _library_texts(split: str, limit: int | None = None) -> Iterator[str]:
    return (path.read_text("utf-8", "replace") for _, path in library_files(split, limit))


def hub_text(source: DataSource, names: SplitNames, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """Any data set of Hugging Face ``datasets`` with a column of texts, of chats, or of prompts and completions.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message names those there are.
        BadRows: more rows are bad than the settings allow.
    """
    train, validation, test = open_splits(source, names, _counts(source, settings), **_options(source, settings))
    return _in_memory(train, validation, test, tokenizer_of, settings)


def streamed_text(source: DataSource, names: SplitNames, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """As ``hub_text``, its training rows read as they are needed. Without a validation split the first rows are held out."""
    import datasets

    opened = open_source(source, streaming=True, **_options(source, settings))
    splits, counts = named_splits(opened, names), _counts(source, settings)
    train, validation, test = (rows if rows is None or counts is None else rows.filter(counts) for rows in splits)
    if validation is None:
        validation, train = train, train.skip(settings.held_out)
    validation, test = (
        None if rows is None else datasets.Dataset.from_list(list(rows.take(settings.held_out))) for rows in (validation, test)
    )
    first = next(iter(train), None)
    if first is None:
        raise ValueError(
            f"the stream has no training row after the {settings.held_out} held out for validation: lower data.eval_samples, "
            "give data.validation_split, or leave out data.streaming"
        )
    columns, features = list(first), train.features or {}
    column = text_column(columns, features, settings.text_column)
    # A look at the beginning is all that a stream allows.
    tokenizer = tokenizer_of(None if column is None else _Texts(train.take(LOOKED_AT), column))
    encoder = encoder_for(columns, features, settings.text_column, tokenizer, settings.length)
    tokens = _tokens(tokenizer, settings)
    # Rows that are still to come are not known; a few early bad ones must not look like a high share.
    counted = BadRowCount(settings.max_bad_fraction, SHUFFLED)
    evaluated = _packed(validation, encoder, tokens, counted)
    return TextData(
        train=StreamedRows(train.shuffle(seed=settings.seed, buffer_size=SHUFFLED), encoder, tokens),
        validation=evaluated,
        test=evaluated if test is None else _packed(test, encoder, tokens, counted),
        has_test=test is not None,
        tokenizer=tokenizer,
        length=settings.length,
        counted=counted,
        streamed=True,
    )


def _in_memory(train: Any, validation: Any, test: Any, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    import datasets

    datasets.disable_progress_bars()
    column = text_column(train.column_names, train.features, settings.text_column)
    tokenizer = tokenizer_of(None if column is None else _Texts(train, column))
    encoder = encoder_for(train.column_names, train.features, settings.text_column, tokenizer, settings.length)
    tokens = _tokens(tokenizer, settings)
    expected = sum(len(rows) for rows in (train, validation, test) if rows is not None)
    counted = BadRowCount(settings.max_bad_fraction, expected)
    trained, evaluated = (_packed(rows, encoder, tokens, counted) for rows in (train, validation))
    return TextData(
        train=trained,
        validation=evaluated,
        test=evaluated if test is None else _packed(test, encoder, tokens, counted),
        has_test=test is not None,
        tokenizer=tokenizer,
        length=settings.length,
        counted=counted,
    )


class _Texts:
    """The texts of a split, as often as they are asked for."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    def __iter__(self) -> Iterator[str]:
        for batch in self.rows.select_columns([self.column]).iter(1000):
            yield from (text for text in batch[self.column] if isinstance(text, str))


def _tokens(tokenizer: Any, settings: TextSettings) -> Tokens:
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Tokens(settings.length, filler, token_bytes(tokenizer))


def _packed(rows: Any, encoder: Encoder, tokens: Tokens, counted: BadRowCount) -> PackedRows:
    """Encodes a split, which ``datasets`` keeps on disk where the split itself is there, and packs it."""
    import datasets

    features = {"tokens": datasets.Sequence(datasets.Value("int32")), "bad": datasets.Value("string")}
    if encoder.prompts:
        features["learned"] = datasets.Sequence(datasets.Value("bool"))
    encoded = rows.map(
        _encode,
        batched=True,
        fn_kwargs={"encoder": encoder},
        remove_columns=rows.column_names,
        features=datasets.Features(features),
    )
    counted.add(len(encoded), [BadRow(row, reason) for row, reason in enumerate(encoded["bad"]) if reason])
    lists = encoded.data.column("tokens").chunks
    learned = [_flat(chunk) for chunk in encoded.data.column("learned").chunks] if encoder.prompts else None
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists]) if lists else np.empty(0, np.int64)
    corpus = Corpus([_flat(chunk) for chunk in lists], lengths, learned)
    return PackedRows(corpus, (keep_whole if encoder.prompts else cut_end_to_end)(corpus, tokens.length), tokens)


def _flat(chunk: Any) -> np.ndarray:
    values: np.ndarray = chunk.flatten().to_numpy(zero_copy_only=False)
    return values


def _encode(rows: Mapping[str, Any], encoder: Encoder) -> dict[str, list[Any]]:
    documents = encoder.texts(rows)
    columns: dict[str, list[Any]] = {"tokens": [item.tokens for item in documents], "bad": [item.bad for item in documents]}
    if encoder.prompts:
        columns["learned"] = [item.tokens.astype(bool) if item.learned is None else item.learned for item in documents]
    return columns


def _options(source: DataSource, settings: TextSettings) -> dict[str, Any]:
    return {"sample_by": settings.sample_by} if source.name == "text" else {}


def _counts(source: DataSource, settings: TextSettings) -> Callable[[Mapping[str, Any]], bool] | None:
    """Lines and paragraphs of a file are told apart by blank ones, which are none themselves."""
    return _not_blank if source.name == "text" and settings.sample_by != "document" else None


def _not_blank(row: Mapping[str, Any]) -> bool:
    return bool(row["text"].strip())
