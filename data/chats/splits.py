"""Splits of chats about images: the embedded questions, or a data set of Hugging Face ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..embedded.digit_questions import QUESTIONS, DigitQuestions
from ..hub import open_splits
from ..rows import BadRow
from ..source import DataSource, SplitNames
from ..splits import Splits
from ..text.columns import find_columns
from ..text.conversations import WrongRow
from .encoder import ChatEncoder
from .messages import asked, chat_of, images_of
from .packing import ChatPacking

_IMAGE_COLUMNS = ("images", "image")
_SHOWN = 20


@dataclass(frozen=True)
class ChatColumns:
    """The columns that are read.

    Attributes:
        chat: column of chats.
        images: column of a row's image or images; None if messages hold them.
    """

    chat: str
    images: str | None


class ChatRows(Dataset[dict[str, Any]]):
    """Encoded chats. Index i is row i % n of epoch i // n.

    Args:
        rows: data set whose items are mappings.
        columns: the columns to read.
        encoder: encodes a chat.
        folder: folder that paths of images start from.
        kinds: names of the kinds of questions, in the order of their numbers; rows have them in ``kinds``.
    """

    def __init__(self, rows: Any, columns: ChatColumns, encoder: ChatEncoder, folder: Path, kinds: Sequence[str] = ()) -> None:
        self.rows, self.columns, self.encoder, self.folder, self.kinds = rows, columns, encoder, folder, tuple(kinds)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row: Mapping[str, Any] = self.rows[index % len(self)]
            messages, held = chat_of(row[self.columns.chat])
            column = None if self.columns.images is None else row[self.columns.images]
            item = self.encoder(messages, images_of(column, held, self.folder))
        except WrongRow as wrong:
            return {"bad": BadRow(index % len(self), str(wrong))}
        except Exception as error:
            # Images inside messages are decoded by the data set, whose decoders raise exceptions of many types.
            return {"bad": BadRow(index % len(self), f"unreadable row ({type(error).__name__})")}
        kinds = torch.tensor([self.kinds.index(kind) for kind in row["kinds"]] if self.kinds else [])
        predicted = int((item["turns"] >= 0).sum())
        return item | {
            "kinds": kinds.long(),
            "sample_ids": torch.tensor(index),
            "tokens": len(item["input_ids"]),
            "predicted": predicted,
        }

    def asked(self, index: int) -> list[tuple[str, str]]:
        """Texts of question and answer of each turn of a row that is not bad."""
        return asked(chat_of(self.rows[index % len(self)][self.columns.chat])[0])


@dataclass(frozen=True, kw_only=True)
class ChatData(Splits):
    """Splits of chats about images.

    Attributes:
        processor: processor of the rows.
        length: largest number of tokens of a row.
        kinds: names of the kinds of questions; empty if rows have none.
        packing: how chats of a training batch are packed into rows; None gives each a row.
    """

    processor: Any
    length: int
    kinds: Sequence[str] = ()
    packing: ChatPacking | None = None

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the processor."""
        return self.processor.tokenizer

    def train_batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return super().train_batch(items) if self.packing is None else self.packing(items)

    def save_beside(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)


def digit_questions(train_rows: int, eval_rows: int, processor: Any, length: int, kinds: Sequence[str] = QUESTIONS) -> ChatData:
    """Splits of the embedded questions about digits.

    Args:
        train_rows: number of training pictures.
        eval_rows: number of validation pictures, and of test pictures.
        processor: processor of the model.
        length: largest number of tokens of a row.
        kinds: kinds of questions that are asked.
    """
    encoder, columns = ChatEncoder(processor, length), ChatColumns("messages", "images")
    train, validation, test = (
        ChatRows(DigitQuestions(split, rows, kinds=kinds), columns, encoder, Path(), QUESTIONS)
        for split, rows in (("train", train_rows), ("validation", eval_rows), ("test", eval_rows))
    )
    return ChatData(train, validation, test, processor=processor, length=length, kinds=QUESTIONS)


def hub_chats(
    source: DataSource, names: SplitNames, processor: Any, length: int, chat_column: str | None, image_column: str | None, folder: Path
) -> ChatData:
    """Splits of any data set of Hugging Face ``datasets`` with a column of chats.

    Args:
        source: name, files and revision of the data set.
        names: names of the splits.
        processor: processor of the model.
        length: largest number of tokens of a row.
        chat_column: column of chats; None finds it.
        image_column: column of images; None finds it.
        folder: folder that paths of images start from.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message lists the existing ones.
    """
    train, validation, test = open_splits(source, names)
    columns, encoder = _columns(train, chat_column, image_column), ChatEncoder(processor, length)
    splits = [None if rows is None else ChatRows(_undecoded(rows), columns, encoder, folder) for rows in (train, validation, test)]
    assert splits[0] is not None
    assert splits[1] is not None
    note = f"data: chats of column {columns.chat!r}, images of " + (f"column {columns.images!r}" if columns.images else "their messages")
    return ChatData(
        splits[0],
        splits[1],
        splits[1] if splits[2] is None else splits[2],
        has_test=splits[2] is not None,
        notes=[note],
        processor=processor,
        length=length,
    )


def _columns(rows: Any, chat: str | None, images: str | None) -> ChatColumns:
    names = list(rows.column_names)
    for key, name in (("data.chat_column", chat), ("data.image_column", images)):
        if name is not None and name not in names:
            raise ValueError(f"{key} = {name!r} is missing from the data: its columns are {', '.join(names)}")
    if chat is None:
        shown = [rows[index] for index in range(min(_SHOWN, len(rows)))] if not _has_images(rows) else []
        usual = [name for name in ("messages", "conversations", "conversation") if name in names]
        if not usual:
            found = find_columns(names, rows.features, shown, None).chat
            if found is None:
                raise ValueError(f"no chats found in the data: set data.chat_column to one of {', '.join(names)}")
            usual = [found]
        chat = usual[0]
    return ChatColumns(chat, images or next((name for name in _IMAGE_COLUMNS if name in names), None))


def _has_images(rows: Any) -> bool:
    import datasets

    return any(isinstance(feature, datasets.Image) for feature in rows.features.values())


def _undecoded(rows: Any) -> Any:
    """The rows with images as bytes or paths, so that one that cannot be decoded is a bad row, and all are decoded alike."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner := getattr(feature, "feature", None), datasets.Image) and inner.decode:
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows
