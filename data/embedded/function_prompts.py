"""The embedded long prompts with short answers: functions of the standard library, and a question about one of them.

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

# A longer function would fill a short prompt, and a longer answer is hard to give letter by letter.
_LONGEST, _LONGEST_ANSWER = 800, 32
# Answers that a guess without the context often hits.
_GUESSED = {"None", "True", "False", "self", "0", "1", "''", '""', "()", "[]", "{}", "result", "NotImplemented"}


# Kinds of questions: the default value of a parameter, what a function returns, the name of its last parameter.
FACTS = ("default", "returned", "parameter")


@dataclass(frozen=True)
class Fact:
    """A question about a function.

    Attributes:
        kind: one of FACTS.
        question: a comment up to its last word, which the answer follows.
        answer: a piece of the function's source.
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
    if function.name.startswith("__"):
        # Many classes have one of this name.
        return
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults = zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True)
    for argument, default in (*defaults, *zip(given.kwonlyargs, given.kw_defaults, strict=True)):
        if default is not None and (answer := _answer(default, lines)) is not None:
            yield Fact("default", f"# The default value of {argument.arg} in {function.name} is", answer)
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    # A function that returns at several places has no single answer.
    if len(returned) == 1 and (answer := _answer(returned[0], lines)) is not None:
        yield Fact("returned", f"# The function {function.name} returns", answer)
    last = [argument.arg for argument in (*positional, *given.kwonlyargs) if argument.arg not in ("self", "cls")][-1:]
    for name in last:
        yield Fact("parameter", f"# The last parameter of {function.name} is", name)


def _answer(expression: ast.expr, lines: list[str]) -> str | None:
    """The source of an expression; None if it is long or a guess."""
    if expression.lineno != expression.end_lineno:
        return None
    # Columns count bytes.
    found = lines[expression.lineno - 1].encode()[expression.col_offset : expression.end_col_offset].decode()
    return found if len(found) <= _LONGEST_ANSWER and found not in _GUESSED else None
