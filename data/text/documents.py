"""From a row of text to token ids and a mask of learned tokens: plain text, prompt and completion, or a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

EMPTY = np.empty(0, np.int32)


class Document(NamedTuple):
    """One encoded row.

    Attributes:
        tokens: (n,) int32 token ids, with an end-of-text token; empty if the row is bad.
        learned: (n,) bool, False for tokens of a prompt; None if every token is learned.
        bad: reason why the row is bad; empty if it is good.
    """

    tokens: np.ndarray
    learned: np.ndarray | None
    bad: str = ""


@dataclass(frozen=True)
class Encoder:
    """Converts rows of a data set to documents.

    Attributes:
        tokenizer: tokenizer with an ``eos_token``.
        column: column of texts; None if rows have prompts.
        chat: True if rows have ``messages``; otherwise they have ``prompt`` and ``completion``, each a text or a list of messages.
        limit: tokens of a packed row. A document with a prompt is truncated to it, and is bad if no learned token is left.
    """

    tokenizer: Any
    column: str | None
    chat: bool
    limit: int

    @property
    def prompts(self) -> bool:
        """True if rows have prompts, which are not learned; such documents are never split over two packed rows."""
        return self.column is None

    def texts(self, rows: Mapping[str, Sequence[Any]]) -> list[Document]:
        """Documents of a batch of rows, given column by column as in ``datasets``."""
        if self.column is not None:
            return self._plain(rows[self.column])
        names = ("messages",) if self.chat else ("prompt", "completion")
        return [self._with_prompt(*row) for row in zip(*(rows[name] for name in names), strict=True)]

    def _plain(self, texts: Sequence[Any]) -> list[Document]:
        good = [text for text in texts if isinstance(text, str) and text.strip()]
        encoded = iter(self.tokenizer(good)["input_ids"] if good else [])
        documents = []
        for text in texts:
            if not isinstance(text, str):
                documents.append(_bad("missing text" if text is None else f"{type(text).__name__} in place of a text"))
            elif not text.strip():
                documents.append(_bad("empty text"))
            else:
                documents.append(Document(np.asarray(self._ended(next(encoded)), np.int32), None))
        return documents

    def _with_prompt(self, prompt: Any, completion: Any = None) -> Document:
        if self.chat:
            return self._conversation(prompt, 0)
        if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
            return self._conversation([*prompt, *completion], len(prompt))
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not isinstance(text, str):
                return _bad(f"missing {name}" if text is None else f"{type(text).__name__} in place of a {name}")
        if not completion.strip():
            return _bad("empty completion")
        # Tokenized separately, so that no token spans the border.
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        while prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
        completion_ids = self._ended(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        return self._cut([*prompt_ids, *completion_ids], [(len(prompt_ids), len(prompt_ids) + len(completion_ids))])

    def _conversation(self, messages: Any, first: int) -> Document:
        """A chat through the tokenizer's template; the assistant's answers from message ``first`` on are learned."""
        problem = _wrong_messages(messages)
        if problem:
            return _bad(problem)
        answers = [number for number, message in enumerate(messages) if number >= first and message["role"] == "assistant"]
        if not answers:
            return _bad("no answer of the assistant")
        try:
            whole = self._templated(messages, False)
            spans = []
            for number in answers:
                before, after = self._templated(messages[:number], True), self._templated(messages[: number + 1], False)
                # Templates may change earlier turns when later ones follow (remove thoughts, for example): such turns are not learned.
                if whole[: len(before)] == before and whole[: len(after)] == after:
                    spans.append((len(before), len(after)))
        except Exception as error:
            # Templates raise exceptions of any type for unexpected roles.
            return _bad(f"chat template refuses the row ({type(error).__name__})")
        return self._cut(whole, spans) if spans else _bad("chat template changes the prompt when its answer is added")

    def _templated(self, messages: Sequence[Any], prompting: bool) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=prompting, return_dict=False
        )
        return ids

    def _cut(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Document:
        learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            learned[start:stop] = True
        # The first token of a document has no preceding token to be predicted from.
        if not learned[1 : self.limit].any():
            return _bad("prompt fills data.sequence_length and leaves no room for its answer")
        return Document(np.asarray(ids[: self.limit], np.int32), learned[: self.limit])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]


def _bad(reason: str) -> Document:
    return Document(EMPTY, None, reason)


def _wrong_messages(messages: Any) -> str:
    """The fault of a chat, found without a template; empty if there is none."""
    if not isinstance(messages, list | tuple) or not messages:
        return "no messages"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "message without role"
        if not isinstance(message.get("content"), str):
            return "message without text"
    return ""


def encoder_for(columns: Sequence[str], features: Mapping[str, Any], requested: str | None, tokenizer: Any, limit: int) -> Encoder:
    """The encoder that fits the columns of a data set.

    Args:
        columns: names of the columns.
        features: features by column name, to find columns of strings; empty if they are unknown.
        requested: value of ``data.text_column``.
        tokenizer: tokenizer of the encoder.
        limit: value of ``data.sequence_length``.

    Raises:
        ValueError: no column fits, or rows are chats and the tokenizer has no chat template; the message lists the columns.
    """
    existing = ", ".join(columns)
    column = text_column(columns, features, requested)
    if column is not None:
        return Encoder(tokenizer, column, False, limit)
    chat = "messages" in columns
    has_messages = chat or ("prompt" in columns and _are_messages(features.get("prompt")))
    if not chat and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"no text found in the data: set data.text_column to one of {existing}, or provide messages, or prompt and completion"
        )
    if has_messages and not tokenizer.chat_template:
        raise ValueError(
            f"the column {'messages' if chat else 'prompt'} has messages, but the tokenizer has no chat template: set data.tokenizer to one "
            "of a chat model, or provide columns prompt and completion with texts"
        )
    return Encoder(tokenizer, None, chat, limit)


def _are_messages(feature: Any) -> bool:
    """True if the feature of a column is a list, which has no dtype; False if the feature is unknown."""
    return feature is not None and not hasattr(feature, "dtype")


def text_column(columns: Sequence[str], features: Mapping[str, Any], requested: str | None) -> str | None:
    """The column of plain texts; None if rows have messages, or prompt and completion. Raises ValueError if ``requested`` is missing."""
    if requested is not None:
        if requested not in columns:
            raise ValueError(f"data.text_column = {requested!r} is missing from the data: its columns are {', '.join(columns)}")
        return requested
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        return None
    strings = [name for name in columns if getattr(features.get(name), "dtype", None) in ("string", "large_string")]
    return "text" if "text" in columns else strings[0] if len(strings) == 1 else None
