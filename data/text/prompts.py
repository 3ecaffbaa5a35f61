"""Rows of long prompts with short answers, one prompt a row: the embedded questions about functions, or rows of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...modules.tokens.labels import IGNORE_TOKEN
from ..embedded.function_prompts import FACTS, KnownFunction
from .packing import Corpus

# Where the function of a question stands in its prompt.
THIRDS = ("first third", "middle third", "last third")
# Functions that are tried for each 64 tokens of a prompt.
_TRIES = 30


def kinds_of(lengths: Sequence[int]) -> list[str]:
    """Names of the kinds of questions, in the order of their numbers."""
    return [f"{length} tokens, {third}" for length in lengths for third in THIRDS]


@dataclass(frozen=True)
class _Question:
    """A question in tokens.

    Attributes:
        function: index of its function.
        kind: index of its kind.
        line: tokens of the question.
        answer: tokens of the answer.
        shown: tokens of both, as an example.
        texts: question and answer.
    """

    function: int
    kind: int
    line: list[int]
    answer: list[int]
    shown: list[int]
    texts: tuple[str, str]


class FunctionPrompts(Dataset[dict[str, Any]]):
    """Prompts about functions. Index i is row i % n of epoch i // n; a row is a function of seed and index, the same in every epoch.

    A prompt has as many functions as its length allows, the beginning of one of them again with its answer as an example, and that of another
    one, which the answer goes on with. Several questions in a row have the same functions.

    Args:
        functions: functions of a split.
        tokenizer: tokenizer with an ``eos_token``.
        lengths: lengths of prompts in tokens, in turns; a row is at most as long, its answer included.
        questions: number of questions about the same functions.
        rows: number of rows.
        seed: seed of the rows.

    An item has ``input_ids``, ``labels`` (IGNORE_TOKEN in the prompt), ``attention_mask`` and ``turns`` (0 in the answer, -1 elsewhere; the
    token that ends the text is learned and no part of the answer), each (n,) int64; ``kinds`` (1,), its number in ``kinds_of``;
    ``sample_ids``, ``tokens`` and ``predicted``.

    Raises:
        ValueError: no function fits into a length.
    """

    def __init__(
        self, functions: Sequence[KnownFunction], tokenizer: Any, lengths: Sequence[int], questions: int, rows: int, seed: int
    ) -> None:
        self.lengths, self.questions, self.rows, self.seed = tuple(lengths), questions, rows, seed
        self.names, self.end = [function.name for function in functions], tokenizer.eos_token_id
        self.begin = [first] if (first := tokenizer("x")["input_ids"][0]) == tokenizer.bos_token_id else []

        def ids(texts: list[str]) -> list[list[int]]:
            found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            return found

        # Line breaks are in front, as a tokenizer cuts the whole text.
        self.pieces = ids([f"\n\n{function.source}" for function in functions])
        facts = [(at, fact) for at, function in enumerate(functions) for fact in function.facts]
        lines, answers = ids([f"\n\n{fact.question}" for _, fact in facts]), ids([fact.answer for _, fact in facts])
        examples = ids([f"\n\n{fact.question}{fact.answer.rstrip()}" for _, fact in facts])
        self.known = [
            _Question(at, FACTS.index(fact.kind), *parts, (fact.question, fact.answer.strip()))
            for (at, fact), *parts in zip(facts, lines, answers, examples, strict=True)
        ]
        self.fitting = [self._fitting(length) for length in self.lengths]

    def _fitting(self, length: int) -> list[np.ndarray]:
        """By kind, the questions that fit into prompts of a length, whichever are drawn together."""
        most = (length - 2) // (self.questions + 3)
        fits = [
            number
            for number, known in enumerate(self.known)
            if max(len(self.pieces[known.function]), len(known.shown), len(known.line) + len(known.answer)) <= most
        ]
        if len({self.names[self.known[number].function] for number in fits}) <= self.questions:
            raise ValueError(
                f"data.lengths has {length}, and too few functions of the library have so few tokens: give lengths of 256 or more, or lower "
                f"data.questions = {self.questions}"
            )
        kinds = [np.asarray([number for number in fits if self.known[number].kind == kind]) for kind in range(len(FACTS))]
        return [found for found in kinds if len(found)]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        context, number = divmod(index % self.rows, self.questions)
        which = context % len(self.lengths)
        ids, starts, example, asked = self._context(context, which)
        question = asked[number]
        prompt = [*self.begin, *ids, *example.shown, *question.line]
        third = starts[question.function] * len(THIRDS) // len(ids)
        row = _row(np.asarray([*prompt, *question.answer, self.end]), np.repeat([-1, 0], [len(prompt), len(question.answer) + 1]))
        # The token that ends the text is learned, and is no part of the answer.
        row["turns"][-1] = -1
        return row | {"kinds": torch.tensor([which * len(THIRDS) + third]), "sample_ids": torch.tensor(index)}

    def asked(self, index: int) -> list[tuple[str, str]]:
        """Texts of question and answer of a row."""
        context, number = divmod(index % self.rows, self.questions)
        *_, questions = self._context(context, context % len(self.lengths))
        return [questions[number].texts]

    def _context(self, context: int, which: int) -> tuple[list[int], dict[int, int], _Question, list[_Question]]:
        """Tokens of the functions, the token that each starts at, the example and the questions."""
        draws = np.random.Generator(np.random.Philox(key=[self.seed, context]))
        chosen: dict[str, _Question] = {}
        while len(chosen) <= self.questions:
            kinds = self.fitting[which]
            question = self.known[int(draws.choice(kinds[int(draws.integers(len(kinds)))]))]
            chosen.setdefault(self.names[question.function], question)
        example, *asked = chosen.values()
        held = [question.function for question in chosen.values()]
        room = self.lengths[which] - len(self.begin) - len(example.shown) - 1 - max(len(item.line) + len(item.answer) for item in asked)
        room -= sum(len(self.pieces[at]) for at in held)
        names = set(chosen)
        for at in draws.integers(len(self.names), size=_TRIES * max(1, self.lengths[which] // 64)).tolist():
            if len(self.pieces[at]) <= room and self.names[at] not in names:
                held.append(at)
                names.add(self.names[at])
                room -= len(self.pieces[at])
        ids: list[int] = []
        starts: dict[int, int] = {}
        for at in draws.permutation(held).tolist():
            starts[at] = len(ids)
            ids += self.pieces[at]
        return ids, starts, example, asked


class PromptRows(Dataset[dict[str, Any]]):
    """Encoded prompts of a data set, one a row. Index i is row i % n of epoch i // n.

    Items are as those of ``FunctionPrompts``; ``turns`` number the answers of a row, the tokens that end them included, and ``kinds`` is
    empty.

    Args:
        corpus: the encoded rows; bad ones are empty.
        tokenizer: tokenizer of the rows.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.rows = np.flatnonzero(np.diff(corpus.starts))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index % len(self)])
        ids, learned = self.corpus.part(int(self.corpus.starts[row]), int(self.corpus.starts[row + 1]))
        assert learned is not None
        # The first token has nothing to be predicted from.
        learned = learned & (np.arange(len(ids)) > 0)
        begins = learned & ~np.concatenate([[False], learned[:-1]])
        made = _row(ids, np.where(learned, begins.cumsum() - 1, -1))
        # Data rows were counted when they were encoded.
        return made | {"kinds": torch.empty(0, dtype=torch.int64), "sample_ids": torch.tensor(index), "rows": 0}

    def asked(self, index: int) -> list[tuple[str, str]]:
        """Texts of question and answer of each turn of a row."""
        row = self[index]
        ids, turns, found, start = row["input_ids"], row["turns"], list[tuple[str, str]](), 0
        for turn in range(int(turns.max()) + 1):
            (places,) = torch.where(turns == turn)
            stop, end = int(places[0]), int(places[-1]) + 1
            found.append((self.tokenizer.decode(ids[start:stop]), self.tokenizer.decode(ids[stop:end])))
            start = end
        return found


def _row(ids: np.ndarray, turns: np.ndarray) -> dict[str, Any]:
    tokens, of = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(turns.astype(np.int64))
    return {
        "input_ids": tokens,
        "labels": tokens.masked_fill(of < 0, IGNORE_TOKEN),
        "attention_mask": torch.ones_like(tokens),
        "turns": of,
        "tokens": len(tokens),
        "predicted": int((of >= 0).sum()),
    }
