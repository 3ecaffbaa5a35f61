"""Signals that end a run: what is at stake is saved first, and the exit code says which signal it was."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal ended the run. No ``Exception``, so that nothing that handles errors of data or plots swallows it.

    Args:
        number: the signal.
        message: what was saved and how to go on.

    Attributes:
        code: exit code, 128 + the signal's number.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number, self.code = number, 128 + number


class StopSignals:
    """SIGTERM, SIGINT (Ctrl-C) and SIGHUP. The first one is noted while ``deferred``, and raises Stopped otherwise; a second one ends the
    process at once.

    Attributes:
        received: the first signal; None without one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[StopSignals]:
        """Context in which this process handles the signals; what was ignored before, as under nohup, stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in NUMBERS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context that asks ``received`` itself, at points where all ranks are at the same step."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if not self._deferred:
            raise Stopped(number)
