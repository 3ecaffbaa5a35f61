"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from ..errors import RecipeError
from ..run_folder import RunFolder


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Context in which this process owns a run folder. The system releases the lock when the process ends, however it ends.

    Raises:
        RecipeError: another process owns the folder, which the message names, or the folder cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        opened = run.lock.open("a+")
    except OSError as error:
        raise RecipeError(f"{run.path} cannot be a run's folder: {error.strerror}; take another output folder") from None
    with opened as file:
        try:
            # Of the process alone: loader processes, which may live a little longer, do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RecipeError(
                f"{run.path} is in use by another run ({_owner(run)}): wait for its end, stop it, or take another output folder"
            ) from None
        except OSError:
            # Some network file systems have no locks.
            yield
            return
        file.seek(0)
        file.truncate()
        json.dump({"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
        file.flush()
        yield


def _owner(run: RunFolder) -> str:
    try:
        owner = json.loads(run.lock.read_text())
        return f"process {owner['process']} on {owner['machine']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has just started"
