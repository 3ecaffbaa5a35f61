"""What every verb shares: where output goes, and how errors end it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import typer
from rich.console import Console

_stdout: TextIO = sys.stdout
FAILED, WRONG_INPUT, TERMINATED = 1, 2, 143


def console(as_json: bool) -> Console:
    """stdout for people; with ``--json`` stderr, so that stdout holds one object and nothing else."""
    # A pipe or file is no terminal and has no width; tables must not be squeezed to 80 columns there.
    stream = sys.stderr if as_json else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160)


def keep_stdout_clean() -> None:
    """Under ``--json``, sends what libraries print to stderr, at the level of file descriptors; ``emit`` has the real stdout."""
    global _stdout
    if "--json" in sys.argv:
        sys.stdout.flush()
        _stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)


def emit(data: Any, as_json: bool) -> None:
    """Prints the machine-readable object, if it was asked for."""
    if as_json:
        _stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
        _stdout.flush()


def end(message: str, code: int) -> typer.Exit:
    """Prints one message to stderr; raise what this returns."""
    sys.stderr.write(message + "\n")
    return typer.Exit(code)


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Inside, a ValueError is the user's mistake: one message, no traceback, exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise end(f"error: {error}", WRONG_INPUT) from None


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Inside, a failure ends with exit code 1 and its traceback; a stop by SIGTERM with 143."""
    from ..recipe_files import RecipeError
    from ..run import Stopped

    try:
        yield
    except Stopped as stopped:
        raise end(str(stopped), TERMINATED) from None
    except RecipeError as error:
        raise end(f"error: {error}", WRONG_INPUT) from None
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        import traceback

        from ...data.images import BadRows
        from ..callbacks.guards import NotANumber

        expected = isinstance(error, BadRows | NotANumber)
        raise end(("" if expected else traceback.format_exc()) + f"failed: {error}", FAILED) from None
