"""The embedded long prompts with short answers: functions of the standard library, and the beginning of one of them to go on with.

Most of a prompt does not matter to its question. Needs no network and copies nothing. Files belong to the same splits as in
``python_library``, so that no function of the test prompts is in a training prompt.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .python_functions import Function, functions_of
from .python_library import library_files

# A longer function would fill a short prompt, and a longer answer is hard to give to the letter.
_LONGEST, _LONGEST_ANSWER = 800, 32
# Kinds of questions: what a function returns, its last parameter, the default value of that parameter.
FACTS = ("returned", "parameter", "default")


@dataclass(frozen=True)
class Fact:
    """A question about a function.

    Attributes:
        kind: one of FACTS.
        question: the function's first line or a part of it, up to what is asked.
        answer: the rest of the line; a line break ends what a function returns.
    """

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class KnownFunction:
    """A function of a prompt.

    Attributes:
        name: its name.
        source: its whole source.
        facts: what can be asked about it; none for a function that only fills prompts.
    """

    name: str
    source: str
    facts: tuple[Fact, ...]


def known_functions(split: str, limit: int | None = None, root: Path | None = None) -> list[KnownFunction]:
    """The short functions and methods of a split, in a fixed order; the first ones are from files drawn at random.

    Args:
        split: ``train``, ``validation`` or ``test``.
        limit: highest number of functions; None returns all.
        root: folder of the standard library; None uses the running Python's.
    """
    return list(itertools.islice(_known(split, root), limit))


def _known(split: str, root: Path | None) -> Iterator[KnownFunction]:
    for name, path in library_files(split, root=root):
        if not name.endswith(".py"):
            continue
        text = path.read_text("utf-8", "replace")
        lines = text.split("\n")
        for function, source in functions_of(text):
            if len(source) <= _LONGEST:
                yield KnownFunction(function.name, source, tuple(_facts(function, lines)))


def _facts(function: Function, lines: list[str]) -> Iterator[Fact]:
    # Columns count bytes. A line above the body holds the whole signature.
    line = lines[function.lineno - 1].encode()
    head = line[function.col_offset :].decode().rstrip()
    if function.name.startswith("__") or function.body[0].lineno == function.lineno or not head.endswith(":"):
        # Many classes have a function of such a name.
        return
    given = function.args
    arguments, defaults = [*given.posonlyargs, *given.args], given.defaults
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    # A function that returns at several places has no single answer.
    if len(returned) == 1 and returned[0].lineno == returned[0].end_lineno:
        value = lines[returned[0].lineno - 1].encode()[returned[0].col_offset : returned[0].end_col_offset].decode()
        yield from _fact("returned", f"{head}\n    return", f" {value}\n")
    if given.vararg is None and not given.kwonlyargs and given.kwarg is None and len(arguments) > 1:
        last = defaults[-1] if defaults else arguments[-1]
        # 0 and 1 too.
        guessed = isinstance(last, ast.Constant) and last.value in (None, True, False)
        if last.lineno == function.lineno and not guessed:
            yield from _fact(
                "default" if defaults else "parameter", *_cut(line[function.col_offset :], last.col_offset - function.col_offset)
            )


def _cut(line: bytes, at: int) -> tuple[str, str]:
    """A line up to a byte, without the space in front of it, and the rest."""
    begin, whole = line[:at].decode().rstrip(), line.decode().rstrip()
    return begin, whole[len(begin) :]


def _fact(kind: str, question: str, answer: str) -> Iterator[Fact]:
    if 1 < len(answer) <= _LONGEST_ANSWER:
        yield Fact(kind, question, answer)
