"""Which columns of a data set hold the text, the chats, or the prompts and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Rows in which the columns are recognised.
SHOWN = 20
# Columns of chats by convention, in order of preference; the second ones are of ShareGPT.
_CHATS = ("messages", "conversations", "conversation")
# Columns beside a chat that are parts of its prompt.
OF_THE_PROMPT = ("system", "tools", "documents", "chat_template_kwargs")
# Keys of a message: of OpenAI and of ShareGPT.
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class TextColumns:
    """The columns that are read. Exactly one of ``text``, ``chat`` and ``paired`` is set.

    Attributes:
        text: column of plain texts.
        chat: column of chats.
        paired: True if the columns ``prompt`` and ``completion`` are read.
        beside: columns that are parts of the prompts of chats, of OF_THE_PROMPT.
        chats: True if rows are lists of messages, in ``chat`` or in ``prompt`` and ``completion``.
        guessed: True if ``text`` or ``chat`` is the only one left, not one with a usual name.
        unread: all other columns.
    """

    text: str | None = None
    chat: str | None = None
    paired: bool = False
    beside: tuple[str, ...] = ()
    chats: bool = False
    guessed: bool = False
    unread: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One line for the log: what is read, and what is not."""
        read = f"prompts and completions{self._beside}" if self.paired else ""
        if self.chat is not None:
            read = f"chats of column {self.chat!r}{self._beside}"
        if self.text is not None:
            read = f"texts of column {self.text!r}"
        guess = ", guessed because it is the only one that fits: data.text_column names another" if self.guessed else ""
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"data: {read}{guess}{unread}"

    @property
    def _beside(self) -> str:
        return f" with {', '.join(self.beside)}" if self.beside else ""


def find_columns(
    names: Sequence[str], features: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], requested: str | None, plain: bool = False
) -> TextColumns:
    """The columns to read.

    Args:
        names: names of the columns.
        features: features of ``datasets`` by column; empty if they are unknown.
        rows: some rows of the data, in which chats are recognised.
        requested: value of ``data.text_column``; None finds the columns.
        plain: only a column of plain texts is searched.

    Raises:
        ValueError: a column is missing, no column fits, or messages would be left unread; the message lists the columns.
    """
    kinds = {name: _kind(features.get(name), [row.get(name) for row in rows]) for name in names}
    found = _requested(kinds, requested, plain) if requested is not None else _found(kinds, plain)
    used = {found.text, found.chat, *(("prompt", "completion") if found.paired else ())}
    chats = found.chat is not None or (found.paired and "messages" in (kinds["prompt"], kinds["completion"]))
    beside = tuple(name for name in OF_THE_PROMPT if chats and name in kinds and name not in used)
    left = [name for name in kinds if name not in used and name not in beside]
    if requested is None:
        # Beside a guess, whatever may hold text is refused; beside a usual name only what looks like another chat.
        lost = [name for name in left if kinds[name] == "messages" or (found.guessed and kinds[name] == "nested")]
        if lost:
            raise ValueError(
                f"columns {', '.join(lost)} of the data hold lists or mappings of texts, which would not be read beside "
                f"{found.text or found.chat or 'prompt and completion'}: set data.text_column to the column to learn from, of "
                f"{', '.join(kinds)}; pairs of a chosen and a rejected answer are not supported"
            )
    return TextColumns(found.text, found.chat, found.paired, beside, chats, found.guessed, tuple(left))


def _requested(kinds: Mapping[str, str], name: str, plain: bool) -> TextColumns:
    if name not in kinds:
        raise ValueError(f"data.text_column = {name!r} is missing from the data: its columns are {', '.join(kinds)}")
    return TextColumns(chat=name) if kinds[name] == "messages" and not plain else TextColumns(text=name)


def _found(kinds: Mapping[str, str], plain: bool) -> TextColumns:
    if "messages" in kinds and not plain:
        return TextColumns(chat="messages")
    if {"prompt", "completion"} <= kinds.keys() and not plain:
        return TextColumns(paired=True)
    if "text" in kinds:
        return TextColumns(text="text")
    chats = [name for name, kind in kinds.items() if kind == "messages" and not plain]
    usual = [name for name in _CHATS if name in chats]
    if usual or len(chats) == 1:
        return TextColumns(chat=usual[0] if usual else chats[0], guessed=not usual)
    strings = [name for name, kind in kinds.items() if kind == "text"]
    if len(strings) == 1:
        return TextColumns(text=strings[0], guessed=True)
    more = "" if plain else ", or provide messages, or prompt and completion"
    raise ValueError(f"no text found in the data: set data.text_column to one of {', '.join(kinds)}{more}")


def _kind(feature: Any, values: Sequence[Any]) -> str:
    """``text``, ``messages`` (a list of mappings with a speaker and what is said), ``nested`` (another list or mapping with strings) or
    ``other``."""
    for value in values:
        if isinstance(value, str):
            return "text"
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            return "messages" if any(keys <= value[0].keys() for keys in _MESSAGE_KEYS) else "nested"
        if isinstance(value, Mapping | list | tuple) and _has_text(value):
            return "nested"
    return "text" if getattr(feature, "dtype", None) in ("string", "large_string") else "other"


def _has_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_text, value.values()))
    return any(map(_has_text, value)) if isinstance(value, list | tuple) else isinstance(value, str)
