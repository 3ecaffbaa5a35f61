"""From a row of text to token ids, and which of them are learned: plain text, prompt and completion, or a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

EMPTY = np.empty(0, np.int32)


class Document(NamedTuple):
    """One row, encoded.

    Attributes:
        tokens: (n,) int32 token ids, the end of the text among them; empty where the row is bad.
        learned: (n,) bool, False for tokens of a prompt; None where every token is learned.
        bad: what is wrong with the row; empty where nothing is.
    """

    tokens: np.ndarray
    learned: np.ndarray | None
    bad: str = ""


@dataclass(frozen=True)
class Encoder:
    """How rows of a data set become documents.

    Attributes:
        tokenizer: with an ``eos_token``.
        column: column of texts; None for rows that have a prompt.
        chat: rows have ``messages``; else ``prompt`` and ``completion``, each a text or a list of messages.
        limit: tokens of a row of the batch: with a prompt, what is longer is cut, and must keep something to learn.
    """

    tokenizer: Any
    column: str | None
    chat: bool
    limit: int

    @property
    def prompts(self) -> bool:
        """Rows have parts that are not learned; such a document is never split over two rows of a batch."""
        return self.column is None

    def texts(self, rows: Mapping[str, Sequence[Any]]) -> list[Document]:
        """Documents of a batch of rows, column by column, as ``datasets`` hands them."""
        if self.column is not None:
            return self._plain(rows[self.column])
        names = ("messages",) if self.chat else ("prompt", "completion")
        return [self._asked(*row) for row in zip(*(rows[name] for name in names), strict=True)]

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

    def _asked(self, prompt: Any, completion: Any = None) -> Document:
        if self.chat:
            return self._conversation(prompt, 0)
        if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
            return self._conversation([*prompt, *completion], len(prompt))
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not isinstance(text, str):
                return _bad(f"missing {name}" if text is None else f"{type(text).__name__} in place of a {name}")
        if not completion.strip():
            return _bad("empty completion")
        # Apart, so that no token has a part of both.
        asked = self.tokenizer(prompt)["input_ids"]
        while asked and asked[-1] == self.tokenizer.eos_token_id:
            asked = asked[:-1]
        answered = self._ended(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        return self._cut([*asked, *answered], [(len(asked), len(asked) + len(answered))])

    def _conversation(self, messages: Any, first: int) -> Document:
        """A chat through the tokenizer's template; answers of the assistant from message ``first`` on are learned."""
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
                # Templates may write earlier turns otherwise once later ones follow (thoughts are left out, say): those are not learned.
                if whole[: len(before)] == before and whole[: len(after)] == after:
                    spans.append((len(before), len(after)))
        except Exception as error:
            # Templates raise whatever their author wrote for roles out of order.
            return _bad(f"chat template refuses the row ({type(error).__name__})")
        return self._cut(whole, spans) if spans else _bad("chat template writes the prompt otherwise without its answer")

    def _templated(self, messages: Sequence[Any], prompting: bool) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=prompting, return_dict=False
        )
        return ids

    def _cut(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Document:
        learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            learned[start:stop] = True
        # The first token of a document has nothing to be predicted from.
        if not learned[1 : self.limit].any():
            return _bad("prompt leaves no room for its answer in data.sequence_length")
        return Document(np.asarray(ids[: self.limit], np.int32), learned[: self.limit])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]


def _bad(reason: str) -> Document:
    return Document(EMPTY, None, reason)


def _wrong_messages(messages: Any) -> str:
    """What is wrong with a chat before any template sees it; empty where nothing is."""
    if not isinstance(messages, list | tuple) or not messages:
        return "no messages"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "message without role"
        if not isinstance(message.get("content"), str):
            return "message without text"
    return ""


def encoder_for(columns: Sequence[str], features: Mapping[str, Any], wanted: str | None, tokenizer: Any, limit: int) -> Encoder:
    """The encoder that the columns of a data set ask for.

    Args:
        columns: names there are.
        features: by name, to tell columns of strings; may be empty where nobody knows them.
        wanted: ``data.text_column``.
        tokenizer: for it.
        limit: ``data.sequence_length``.

    Raises:
        ValueError: no such column, or a chat for a tokenizer without a template; the message names the columns there are.
    """
    there = ", ".join(columns)
    column = text_column(columns, features, wanted)
    if column is not None:
        return Encoder(tokenizer, column, False, limit)
    chat = "messages" in columns
    talks = chat or ("prompt" in columns and _are_messages(features.get("prompt")))
    if not chat and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"no text found in the data: set data.text_column to one of {there}, or give the columns messages, or prompt and completion"
        )
    if talks and not tokenizer.chat_template:
        raise ValueError(
            f"the column {'messages' if chat else 'prompt'} has messages, and the tokenizer has no chat template: set data.tokenizer to one "
            "of a chat model, or give columns prompt and completion with texts"
        )
    return Encoder(tokenizer, None, chat, limit)


def _are_messages(feature: Any) -> bool:
    """A column of lists, by what ``datasets`` says of it; nobody knows where it says nothing."""
    return feature is not None and not hasattr(feature, "dtype")


def text_column(columns: Sequence[str], features: Mapping[str, Any], wanted: str | None) -> str | None:
    """The column of plain texts; None where rows have messages, or prompt and completion. Raises ValueError for a missing one."""
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"data.text_column = {wanted!r} is missing from the data: its columns are {', '.join(columns)}")
        return wanted
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        return None
    strings = [name for name in columns if getattr(features.get(name), "dtype", None) in ("string", "large_string")]
    return "text" if "text" in columns else strings[0] if len(strings) == 1 else None
