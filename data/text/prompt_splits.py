"""Splits of long prompts with short answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..embedded.function_prompts import known_functions
from ..embedded.python_library import SPLITS
from ..hub import open_splits
from ..rows import BadRowCount
from ..source import DataSource, SplitNames
from .columns import SHOWN, find_columns
from .documents import encoder_for
from .prompts import FunctionPrompts, PromptRows, kinds_of
from .splits import TextData, TextSettings, TokenizerOf, encoded, library_texts

# Training functions of the library that are read, and the fewest: prompts need others than those that are asked about.
_MOST, _FEWEST = 4_000, 200


@dataclass(frozen=True, kw_only=True)
class PromptData(TextData):
    """Splits of prompts.

    Attributes:
        kinds: names of the kinds of questions; empty if rows have none.
    """

    kinds: Sequence[str] = ()


def function_prompts(
    train_rows: int, eval_rows: int, lengths: Sequence[int], questions: int, tokenizer_of: TokenizerOf, settings: TextSettings
) -> PromptData:
    """Splits of the embedded prompts.

    Args:
        train_rows: number of training prompts.
        eval_rows: number of validation prompts, and of test prompts.
        lengths: lengths of prompts in tokens.
        questions: questions about the same functions.
        tokenizer_of: makes or loads the tokenizer; its argument is the training files of ``python_library``.
        settings: how text becomes rows.

    Raises:
        ValueError: no function of a split fits into a length.
    """
    tokenizer = tokenizer_of(library_texts("train"))

    def rows(split: str, number: int) -> FunctionPrompts:
        functions = known_functions(split, min(_MOST, max(_FEWEST, number)))
        seed = settings.seed * len(SPLITS) + SPLITS.index(split)
        return FunctionPrompts(functions, tokenizer, lengths, questions, number, seed)

    return PromptData(
        train=rows("train", train_rows),
        validation=rows("validation", eval_rows),
        test=rows("test", eval_rows),
        tokenizer=tokenizer,
        length=settings.length,
        counted=BadRowCount(settings.max_bad_fraction, train_rows),
        kinds=kinds_of(lengths),
    )


def hub_prompts(source: DataSource, names: SplitNames, tokenizer_of: TokenizerOf, settings: TextSettings) -> PromptData:
    """Splits of any data set of Hugging Face ``datasets`` with prompts and completions, or with chats.

    Raises:
        ValueError: the source cannot be opened, a split or column is missing, or the rows are texts without prompts.
        BadRows: the share of bad rows exceeds ``settings.max_bad_fraction``.
    """
    import datasets

    train, validation, test = open_splits(source, names)
    datasets.disable_progress_bars()
    columns = find_columns(train.column_names, train.features, [train[row] for row in range(min(SHOWN, len(train)))], settings.text_column)
    if columns.text is not None:
        raise ValueError(
            f"the column {columns.text!r} has texts without prompts, and this task counts right answers: give columns prompt and completion, "
            "or messages, or set task=causal_lm"
        )
    tokenizer = tokenizer_of(None)
    encoder = encoder_for(columns, tokenizer, settings.length, cuts=False)
    counted = BadRowCount(settings.max_bad_fraction, len(train))

    def rows(split: str, of: Any) -> PromptRows:
        found, bad = encoded(split, of, encoder, counted)
        if bad == len(of):
            raise ValueError(f"all {bad} rows of the {split} data are bad: check data.{split}_split and data.max_bad_fraction")
        return PromptRows(found, tokenizer)

    trained, evaluated = rows("train", train), rows("validation", validation)
    return PromptData(
        train=trained,
        validation=evaluated,
        test=evaluated if test is None else rows("test", test),
        has_test=test is not None,
        tokenizer=tokenizer,
        length=settings.length,
        counted=counted,
        notes=(columns.note,),
    )
