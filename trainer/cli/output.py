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


def first_process(of_machine: bool = False) -> bool:
    """Whether this is the process that speaks for the run, or for its machine; read from what torchrun, SLURM or Laconic set."""
    local = all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return local and (of_machine or all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")))


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
    """Prints the machine-readable object, if it was asked for, once a run."""
    if as_json and first_process():
        _stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
        _stdout.flush()


def end(message: str, code: int, speaks: bool = True) -> typer.Exit:
    """Prints one message to stderr; raise what this returns.

    Args:
        message: what happened.
        code: exit code.
        speaks: whether this process says it; others that end alike keep still.
    """
    if speaks:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    # Whoever watches the processes of a machine, torchrun for example, ends all of them when one exits with another code than 0: the first
    # one would be ended before it has said why, and its code is what counts.
    return typer.Exit(code if speaks or first_process(of_machine=True) else 0)


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Inside, a ValueError is the user's mistake: one message, no traceback, exit code 2. So is a package that was asked for and is not there."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        # Every machine speaks: a folder may be missing on one of them only.
        raise end(f"error: {error}", WRONG_INPUT, first_process(of_machine=True)) from None


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Inside, a failure ends with exit code 1 and its traceback; a stop by SIGTERM with 143."""
    from ..distributed.launch import Ended
    from ..errors import RecipeError
    from ..run import Stopped

    try:
        yield
    except Stopped as stopped:
        raise end(str(stopped), TERMINATED, first_process()) from None
    except RecipeError as error:
        raise end(f"error: {error}", WRONG_INPUT, first_process()) from None
    except Ended as ended:
        raise end(str(ended), ended.code, speaks=bool(str(ended))) from None
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        import traceback

        from ...data.rows import BadRows
        from ..callbacks.guards import NotANumber

        # These end all processes together; anything else may have happened in this one alone.
        expected = isinstance(error, BadRows | NotANumber)
        place = "" if first_process() else f"rank {os.environ.get('RANK', '?')} "
        message = ("" if expected else traceback.format_exc()) + f"{place}failed: {error}"
        raise end(message, FAILED, first_process() or not expected) from None
