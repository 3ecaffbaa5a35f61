"""What comes after the results, and is not worth losing them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def optional(what: str, console: Console) -> Iterator[None]:
    """Context in which an error is one line, and the command goes on.

    Args:
        what: what is missing after an error: ``page was written`` for example.
        console: console for the line.
    """
    try:
        yield
    except Exception as error:
        console.print(f"no {what}: {type(error).__name__}: {error}", highlight=False, soft_wrap=True)
