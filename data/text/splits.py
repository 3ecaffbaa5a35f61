"""Splits of text: the embedded library, or any data set of Hugging Face ``datasets``, encoded and packed into rows of tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..embedded.python_functions import library_functions
from ..embedded.python_library import library_files
from ..hub import named_splits, open_source, open_splits
from ..loader import DataPhase, StepBatches, StreamBatches
from ..rows import BadRow, BadRowCount
from ..source import DataSource, SplitNames
from ..splits import Splits
from .columns import SHOWN, find_columns
from .documents import Encoder, encoder_for
from .files import read_from
from .packing import Corpus, PackedRows, Tokens
from .phases import PhasedBatches, PhasedRows
from .stream import StreamedRows, TokensByRow
from .tokenizer import token_bytes

# Makes or loads a tokenizer; the argument is the training texts, or None if rows have prompts.
TokenizerOf = Callable[[Iterable[str] | None], Any]
# Rows of a stream in the shuffle buffer.
SHUFFLED = 1000
# Rows at the beginning of a stream that a tokenizer is trained on.
LOOKED_AT = 100_000


@dataclass(frozen=True)
class TextSettings:
    """How text becomes rows.

    Attributes:
        length: tokens of a row.
        text_column: column with the texts; None finds it.
        sample_by: unit of the ``text`` builder's files that is one document: ``line``, ``paragraph`` or ``document``.
        max_bad_fraction: allowed share of bad rows.
        held_out: rows of a stream for validation, and as many for test.
        seed: seed of the shuffling of a stream.
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
        tokenizer: tokenizer of the texts.
        length: tokens of a row.
        counted: bad rows found when the splits were encoded.
        streamed: True if the training rows are read during training.
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

    def in_bags(self, bag: int) -> TextData:
        rows: Any = self.train
        return replace(self, train=rows.with_bags(bag))

    def train_phases(
        self, phases: Sequence[DataPhase], seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Dataset[Any], PhasedBatches]:
        numbers, sizes = [phase.batches for phase in phases], [phase.batch_size for phase in phases]
        parts: list[StepBatches] = []
        if self.streamed:
            # One stream, which goes on where the phase before has ended.
            stream: Any = self.train
            taken = list(itertools.accumulate(number * size * world_size for number, size in zip(numbers, sizes, strict=True)))
            rows = [stream.packed([phase.bag for phase in phases], taken[:-1])] * len(phases)
            begin = 0
            for number, size, before in zip(numbers, sizes, [0, *taken], strict=False):
                parts.append(StreamBatches(size, sum(numbers), rank, world_size, before - begin * size * world_size))
                begin += number
        else:
            kinds = [self if phase.bag is None else self.in_bags(phase.bag) for phase in phases]
            rows = [kind.train for kind in kinds]
            parts = [kind.train_batches(size, sum(numbers), seed, rank, world_size) for kind, size in zip(kinds, sizes, strict=True)]
        return PhasedRows(rows), PhasedBatches(parts, numbers)

    def bad_rows(self, allowed: float) -> BadRowCount:
        return copy.deepcopy(self.counted)

    def save_beside(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def python_library(train_files: int, eval_files: int, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """Splits of the embedded text; a file is one document.

    Args:
        train_files: largest number of training files.
        eval_files: largest number of validation files, and of test files.
        tokenizer_of: makes or loads the tokenizer.
        settings: how text becomes rows.
    """
    import datasets

    def texts(split: str, limit: int) -> Any:
        return datasets.Dataset.from_dict({"text": list(library_texts(split, limit))})

    train, validation, test = texts("train", train_files), texts("validation", eval_files), texts("test", eval_files)
    return _in_memory(train, validation, test, tokenizer_of, settings)


def python_functions(train_rows: int, eval_rows: int, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """Splits of the embedded prompts and completions; functions whose prompt is too long for a row are left out.

    Args:
        train_rows: largest number of training functions.
        eval_rows: largest number of validation functions, and of test functions.
        tokenizer_of: makes or loads the tokenizer; its argument is the training files of ``python_library``.
        settings: how text becomes rows.
    """
    import datasets

    tokenizer = tokenizer_of(library_texts("train"))

    def rows(split: str, limit: int) -> Any:
        # Leaves room for at least part of the body, whatever special tokens the tokenizer adds.
        fitting = (row for row in library_functions(split) if len(tokenizer(row["prompt"])["input_ids"]) <= settings.length - 4)
        return datasets.Dataset.from_list(list(itertools.islice(fitting, limit)))

    splits = rows("train", train_rows), rows("validation", eval_rows), rows("test", eval_rows)
    return _in_memory(*splits, lambda _: tokenizer, settings)


def library_texts(split: str, limit: int | None = None) -> Iterator[str]:
    """The files of a split of ``python_library``, at most ``limit`` of them."""
    return (path.read_text("utf-8", "replace") for _, path in library_files(split, limit))


def hub_text(source: DataSource, names: SplitNames, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """Splits of any data set of Hugging Face ``datasets`` with a column of texts, of chats, or of prompts and completions.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message lists the existing ones.
        BadRows: the share of bad rows exceeds ``settings.max_bad_fraction``.
    """
    train, validation, test = open_splits(source, names, _counts(source, settings), **_options(source, settings))
    return _in_memory(train, validation, test, tokenizer_of, settings)


def streamed_text(source: DataSource, names: SplitNames, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    """As ``hub_text``, with training rows read during training. Without a validation split the first rows are held out."""
    import datasets

    opened = open_source(source, streaming=True, **_options(source, settings))
    splits, counts = named_splits(opened, names), _counts(source, settings)
    train, validation, test = (rows if rows is None or counts is None else rows.filter(counts) for rows in splits)
    if validation is None:
        validation, train = train, train.skip(settings.held_out)
    validation, test = (
        None if rows is None else datasets.Dataset.from_list(list(read_from(source, rows.take(settings.held_out))))
        for rows in (validation, test)
    )
    shown = list(read_from(source, train.take(SHOWN)))
    if not shown:
        raise ValueError(
            f"the stream has no training row after the {settings.held_out} held out for validation: lower data.eval_samples, "
            "set data.validation_split, or remove data.streaming"
        )
    columns = find_columns(list(shown[0]), train.features or {}, shown, settings.text_column)
    # Only the beginning of a stream can be read here.
    tokenizer = tokenizer_of(None if columns.text is None else read_from(source, _Texts(train.take(LOOKED_AT), columns.text)))
    encoder = encoder_for(columns, tokenizer, settings.length)
    tokens = _tokens(tokenizer, settings)
    # The number of rows is unknown; SHUFFLED prevents that a few early bad rows are a high share.
    counted = BadRowCount(settings.max_bad_fraction, SHUFFLED)
    evaluated = _packed("validation", validation, encoder, tokens, counted)
    return TextData(
        train=StreamedRows(train.shuffle(seed=settings.seed, buffer_size=SHUFFLED), source, encoder, TokensByRow((tokens,))),
        validation=evaluated,
        test=evaluated if test is None else _packed("test", test, encoder, tokens, counted),
        has_test=test is not None,
        tokenizer=tokenizer,
        length=settings.length,
        counted=counted,
        notes=(columns.note,),
        streamed=True,
    )


def _in_memory(train: Any, validation: Any, test: Any, tokenizer_of: TokenizerOf, settings: TextSettings) -> TextData:
    import datasets

    datasets.disable_progress_bars()
    columns = find_columns(train.column_names, train.features, [train[row] for row in range(min(SHOWN, len(train)))], settings.text_column)
    tokenizer = tokenizer_of(None if columns.text is None else _Texts(train, columns.text))
    encoder = encoder_for(columns, tokenizer, settings.length)
    tokens = _tokens(tokenizer, settings)
    counted = BadRowCount(settings.max_bad_fraction, len(train))
    trained = _packed("train", train, encoder, tokens, counted)
    evaluated = _packed("validation", validation, encoder, tokens, counted)
    return TextData(
        train=trained,
        validation=evaluated,
        test=evaluated if test is None else _packed("test", test, encoder, tokens, counted),
        has_test=test is not None,
        tokenizer=tokenizer,
        length=settings.length,
        counted=counted,
        notes=(columns.note,),
    )


class _Texts:
    """The texts of a split; can be iterated several times."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    def __iter__(self) -> Iterator[str]:
        for batch in self.rows.select_columns([self.column]).iter(1000):
            yield from (text for text in batch[self.column] if isinstance(text, str))


def _tokens(tokenizer: Any, settings: TextSettings) -> Tokens:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Tokens(settings.length, padding, token_bytes(tokenizer))


def _packed(split: str, rows: Any, encoder: Encoder, tokens: Tokens, counted: BadRowCount) -> PackedRows:
    """Encodes a split and packs it.

    Raises:
        BadRows: the share of bad rows of this split exceeds the allowed one.
        ValueError: no token of the split is predicted.
    """
    corpus, bad = encoded(split, rows, encoder, counted)
    packed = PackedRows(corpus, tokens, whole=encoder.prompts)
    # A document with a prompt has a learned token after it, or is bad.
    if not packed.predicted:
        raise ValueError(
            f"no token of the {split} data is predicted: {len(rows)} rows, {bad} of them bad, hold no text to "
            f"learn from; check data.{split}_split and data.max_bad_fraction"
        )
    return packed


def encoded(split: str, rows: Any, encoder: Encoder, counted: BadRowCount) -> tuple[Corpus, int]:
    """The encoded rows of a split (``datasets`` caches them beside the split if it is on disk), empty where they are bad, and how many are.

    Raises:
        BadRows: the share of bad rows of this split exceeds the allowed one.
    """
    import datasets

    features = {"tokens": datasets.Sequence(datasets.Value("int32")), "bad": datasets.Value("string")}
    if encoder.prompts:
        features["learned"] = datasets.Sequence(datasets.Value("bool"))
    found = rows.map(
        _encode,
        batched=True,
        fn_kwargs={"encoder": encoder},
        remove_columns=rows.column_names,
        features=datasets.Features(features),
    )
    bad = [BadRow(row, reason) for row, reason in enumerate(found["bad"]) if reason]
    counted.add_split(split, len(found), bad)
    lists = found.data.column("tokens").chunks
    learned = [_flat(chunk) for chunk in found.data.column("learned").chunks] if encoder.prompts else None
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists]) if lists else np.empty(0, np.int64)
    return Corpus([_flat(chunk) for chunk in lists], lengths, learned), len(bad)


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
    # utf-8-sig: a byte-order mark at the beginning of a file is no character of its text.
    return {"sample_by": settings.sample_by, "encoding": "utf-8-sig"} if source.name == "text" else {}


def _counts(source: DataSource, settings: TextSettings) -> Callable[[Mapping[str, Any]], bool] | None:
    """Predicate that removes blank lines and paragraphs, which only separate documents; None for whole files and other builders."""
    return _not_blank if source.name == "text" and settings.sample_by != "document" else None


def _not_blank(row: Mapping[str, Any]) -> bool:
    return bool(row["text"].strip())
