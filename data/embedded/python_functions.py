"""The embedded prompts and completions: a function of the standard library up to its docstring, then its body.

Needs no network and copies nothing. Files belong to the same splits as in ``python_library``: a model that was pretrained there has
not seen the functions it is tested on.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from .python_library import library_files

Function = ast.FunctionDef | ast.AsyncFunctionDef


def library_functions(split: str, root: Path | None = None) -> Iterator[dict[str, str]]:
    """Rows with ``prompt`` and ``completion`` in a fixed order, one for each function or method with a docstring and a body after it.

    Args:
        split: ``train``, ``validation`` or ``test``.
        root: folder of the standard library; None uses the running Python's.
    """
    for name, path in library_files(split, root=root):
        if name.endswith(".py"):
            yield from _prompts(path.read_text("utf-8", "replace"))


def _prompts(text: str) -> Iterator[dict[str, str]]:
    for function, source in functions_of(text):
        first, body = function.body[0], function.body[1:]
        if ast.get_docstring(function) is None or not body or first.end_lineno == body[0].lineno:
            continue
        assert first.end_lineno is not None
        whole = source.split("\n")
        head = first.end_lineno - first_line(function) + 1
        yield {"prompt": "\n".join(whole[:head]) + "\n", "completion": "\n".join(whole[head:]) + "\n"}


def functions_of(text: str) -> Iterator[tuple[Function, str]]:
    """Module-level functions and methods of a file, each with its source from the first decorator on, dedented; nested ones are left out."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in the library's strings would print warnings.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        # Some files are templates or test data for another grammar.
        return
    lines = text.split("\n")
    for function in _outermost(tree):
        yield function, textwrap.dedent("\n".join(lines[first_line(function) - 1 : function.end_lineno]))


def first_line(function: Function) -> int:
    """Number of a function's first line, that of its first decorator if it has one."""
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def _outermost(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        else:
            yield from _outermost(child)
