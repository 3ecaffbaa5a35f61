"""From a row of text to token ids and a mask of learned tokens: plain text, prompt and completion, or a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .columns import TextColumns
from .conversations import WrongRow, messages_of, options_of

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
        columns: the columns to read.
        limit: tokens of a packed row. A document with a prompt is truncated to it, and is bad if no learned token is left.
        cuts: if False, a longer document with a prompt is bad.
    """

    tokenizer: Any
    columns: TextColumns
    limit: int
    cuts: bool = True

    @property
    def prompts(self) -> bool:
        """True if rows have prompts, which are not learned; such documents are never split over two packed rows."""
        return self.columns.text is None

    def texts(self, rows: Mapping[str, Sequence[Any]]) -> list[Document]:
        """Documents of a batch of rows, given column by column as in ``datasets``."""
        columns = self.columns
        if columns.text is not None:
            return self._plain(rows[columns.text])
        names = ("prompt", "completion") if columns.paired else (columns.chat or "",)
        values = zip(*(rows[name] for name in (*names, *columns.beside)), strict=True)
        return [self._with_prompt(row[: len(names)], dict(zip(columns.beside, row[len(names) :], strict=True))) for row in values]

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

    def _with_prompt(self, row: Sequence[Any], beside: Mapping[str, Any]) -> Document:
        try:
            if not self.columns.paired:
                return self.conversation(messages_of(row[0]), 0, beside)
            prompt, completion = row
            if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
                return self.conversation(messages_of([*prompt, *completion]), len(prompt), beside)
        except WrongRow as wrong:
            return _bad(str(wrong))
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

    def conversation(self, messages: list[dict[str, Any]], first: int, beside: Mapping[str, Any]) -> Document:
        """A chat through the tokenizer's template; the assistant's answers from message ``first`` on are learned."""
        system = beside.get("system")
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages, first = [{"role": "system", "content": system}, *messages], first + 1
        answers = [number for number, message in enumerate(messages) if number >= first and message["role"] == "assistant"]
        if not answers:
            return _bad("no answer of the assistant")
        template = Templated(self.tokenizer, options_of(beside))
        if template.unread:
            return _bad(f"{template.unread[0]}, which the chat template does not read: set data.chat_template to one that does")
        try:
            whole = template(messages, False)
            spans = []
            for number in answers:
                before, after = template(messages[:number], True), template(messages[: number + 1], False)
                # Templates may change earlier turns when later ones follow (remove thoughts, for example): such turns are not learned.
                if whole[: len(before)] == before and whole[: len(after)] == after:
                    spans.append((len(before), len(after)))
            if not spans:
                return _bad(template.difference(messages, answers[-1]))
        except Exception as error:
            # Templates raise exceptions of any type for unexpected roles.
            return _bad(f"chat template refuses the row ({type(error).__name__})")
        start, stop = spans[-1]
        if self.tokenizer.eos_token_id not in whole[start:stop]:
            # The template ends an answer with the marker of the next turn, or not at all: generation would never stop.
            whole, spans[-1] = [*whole[:stop], self.tokenizer.eos_token_id], (start, stop + 1)
        return self._cut(whole, spans)

    def _cut(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Document:
        if not self.cuts and len(ids) > self.limit:
            return _bad("row longer than data.sequence_length")
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


@dataclass(frozen=True)
class Templated:
    """Chats through a tokenizer's template.

    Attributes:
        tokenizer: tokenizer with a chat template.
        options: arguments that the template reads besides the messages, such as ``tools``.
    """

    tokenizer: Any
    options: Mapping[str, Any]

    def __call__(self, messages: Sequence[Any], prompting: bool) -> list[int]:
        """Token ids of a chat; with ``prompting`` the beginning of the next answer follows."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=prompting, return_dict=False, **self.options
        )
        return ids

    @property
    def unread(self) -> list[str]:
        """Options that the template does not name, so that they would be dropped from the prompt."""
        if not self.options:
            return []
        template: str = self.tokenizer.get_chat_template(None, self.options.get("tools"))
        return [name for name in self.options if name not in template]

    def difference(self, messages: Sequence[Any], answer: int) -> str:
        """Why the prompt of an answer is not the beginning of the chat: the reason of a bad row."""
        prompt, whole = (
            self.tokenizer.apply_chat_template(list(given), tokenize=False, add_generation_prompt=prompting, **self.options)
            for given, prompting in ((messages[:answer], True), (messages[: answer + 1], False))
        )
        alike = next((at for at, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), min(len(prompt), len(whole)))
        opened = prompt[alike:]
        if not opened:
            return "chat template changes the prompt when its answer is added"
        return (
            f"chat template begins an answer with {opened!r} when it is generated, and writes it otherwise in a chat: set data.chat_template "
            "to a template that writes both alike"
        )


def _bad(reason: str) -> Document:
    return Document(EMPTY, None, reason)


def encoder_for(columns: TextColumns, tokenizer: Any, limit: int, cuts: bool = True) -> Encoder:
    """The encoder of rows with these columns.

    Args:
        columns: the columns to read.
        tokenizer: tokenizer of the encoder.
        limit: value of ``data.sequence_length``.
        cuts: whether documents with prompts are cut to it.

    Raises:
        ValueError: rows are chats and the tokenizer has no chat template.
    """
    if columns.chats and not tokenizer.chat_template:
        raise ValueError(
            f"the column {columns.chat or 'prompt'} has messages, but the tokenizer has no chat template: set data.tokenizer to one of a "
            "chat model, set data.chat_template, or provide columns prompt and completion with texts"
        )
    return Encoder(tokenizer, columns, limit, cuts)
