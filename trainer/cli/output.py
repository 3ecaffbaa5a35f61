"""Output, errors and exit codes of all commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import typer
from rich.console import Console

_stdout: TextIO = sys.stdout
FAILED, WRONG_INPUT = 1, 2


def first_process(of_machine: bool = False) -> bool:
    """True in the one process of the run, or of the machine, that prints; read from variables of torchrun, SLURM or Laconic."""
    local = all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return local and (of_machine or all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")))


def console(as_json: bool) -> Console:
    """A console on stdout; with ``--json`` on stderr, so that stdout holds one JSON object only."""
    # Pipes and files have no width; 80 columns would be too narrow for the tables.
    stream = sys.stderr if as_json else sys.stdout
    # What is printed holds names of files and data: nothing of it is markup.
    return Console(file=stream, width=None if stream.isatty() else 160, markup=False, emoji=False)


def keep_stdout_clean() -> None:
    """Makes output that a terminal cannot encode harmless. Under ``--json``, redirects stdout to stderr at the level of file descriptors, for libraries that print; ``emit`` uses stdout."""
    global _stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "--json" in sys.argv:
        sys.stdout.flush()
        _stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)


def emit(data: Any, as_json: bool) -> None:
    """Prints the JSON object if it was requested, in the first process only."""
    if as_json and first_process():
        _stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
        _stdout.flush()


def end(message: str, code: int, speaks: bool = True) -> typer.Exit:
    """Prints one message to stderr and returns the exception to raise.

    Args:
        message: message to print.
        code: exit code.
        speaks: whether this process prints; other processes that end alike do not.
    """
    if speaks:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    # Whoever watches the processes of a machine, torchrun for example, ends all of them when one exits with another code than 0: the first
    # one would be ended before it has said why, and its code is what counts.
    return typer.Exit(code if speaks or first_process(of_machine=True) else 0)


def numbers(option: str, given: str, least: int) -> list[int]:
    """The numbers of an option, with commas; in order, and each once.

    Args:
        option: name of the option, for messages.
        given: its value; empty for none.
        least: smallest number that is allowed.

    Raises:
        ValueError: something else was given.
    """
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isascii() or not part.isdigit() or len(part) > 9 or int(part) < least]:
        raise ValueError(
            f"{option} {given}: {wrong[0]!r} must be a number of {least} or more; give several with commas, 1,8,32 for example"
        )
    return sorted({int(part) for part in parts})


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Converts errors in the user's input (ValueError, files that cannot be read, missing packages, sizes that do not fit into the memory)
    to one message and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError) as error:
        # One process of each machine prints: a folder may be missing on one machine only.
        raise end(f"error: {error or 'there is not enough memory'}", WRONG_INPUT, first_process(of_machine=True)) from None
    except KeyboardInterrupt:
        raise end("stopped by SIGINT", 130, first_process(of_machine=True)) from None


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Converts a failure to a traceback and exit code 1, and a stop by a signal to exit code 128 + its number."""
    from ...modules.checkpoints.whole_files import DamagedFile
    from ..distributed.launch import Ended
    from ..distributed.signals import Stopped
    from ..errors import NotSaved, RecipeError

    try:
        yield
    except Stopped as stopped:
        raise end(str(stopped), stopped.code, first_process()) from None
    except KeyboardInterrupt:
        raise end("stopped by SIGINT", 130, first_process()) from None
    except (RecipeError, DamagedFile) as error:
        raise end(f"error: {error}", WRONG_INPUT, first_process()) from None
    except Ended as ended:
        raise end(str(ended), ended.code, speaks=bool(str(ended))) from None
    except typer.Exit:
        raise
    except Exception as error:
        import traceback

        from ...data.rows import BadRows
        from ..callbacks.guards import NotANumber
        from ..compare.running import Failed

        # These errors end all processes; any other error may have happened in this process only.
        expected = isinstance(error, BadRows | NotANumber | NotSaved | Failed)
        place = "" if first_process() else f"rank {os.environ.get('RANK', '?')} "
        message = ("" if expected else traceback.format_exc()) + f"{place}failed: {error}"
        raise end(message, FAILED, first_process() or not expected) from None
