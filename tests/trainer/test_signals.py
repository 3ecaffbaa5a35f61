"""Signals: the first one stops where nothing is lost, the second one at once; the exit code says which it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from laconic.trainer.distributed.signals import NUMBERS, Stopped, StopSignals


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Signals that a shell ignores for a program in the background, or nohup, are not ignored here, and not in programs that start here."""
    ignored = [number for number in NUMBERS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_raised_or_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped, StopSignals().handled():
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    with StopSignals().handled() as signals, signals.deferred():
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before


def test_what_was_ignored_stays_ignored_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().handled() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time\nfrom laconic.trainer.distributed.signals import StopSignals\n"
        "with StopSignals().handled() as signals, signals.deferred():\n"
        " os.kill(os.getpid(), signal.SIGTERM)\n print('one', flush=True)\n os.kill(os.getpid(), signal.SIGINT)\n print('two', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("one\n", -signal.SIGINT)
