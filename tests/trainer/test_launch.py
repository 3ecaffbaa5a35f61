"""Processes that Laconic starts itself: who is heard, how they end together, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from laconic.trainer import run
from laconic.trainer.distributed.launch import Ended, launch
from laconic.trainer.distributed.processes import unstarted
from laconic.trainer.recipe.files import load

# Of each process: its rank, and a file of its own.
BEGIN = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\nmine = f'{sys.argv[1]}/{rank}'\n"


def _command(folder: Path, program: str, *more: str) -> list[str]:
    return [sys.executable, "-c", BEGIN + program, str(folder), *more]


def test_processes_know_their_place_and_only_the_first_is_heard_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = "place = [os.environ[name] for name in ('LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'WORLD_SIZE')]\n"
    said += "print('out', *place, sys.argv[2], flush=True); print('err', *place, file=sys.stderr, flush=True)"
    variables, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    launch(2, 1, _command(tmp_path, said, "data.data_dir=$${local_rank}"))
    told = capfd.readouterr()
    assert told.out == "out 0 2 2 data.data_dir=$${local_rank}\n"
    assert sorted(told.err.splitlines()) == ["err 0 2 2", "err 1 2 2"]
    # A program goes on after it as it was.
    assert dict(os.environ) == variables
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("sys.exit(0 if rank else 2)", 2, ""),
        pytest.param("sys.exit(0 if rank else 1)", 1, "", marks=pytest.mark.slow),
        pytest.param("sys.exit(0 if rank else 143)", 143, "", marks=pytest.mark.slow),
        pytest.param("time.sleep(0 if rank else 60); sys.exit(3)", 1, "failed: a process of this run ended, rank 0 with -15, rank 1 with 3; what", marks=pytest.mark.slow),
        ("rank and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)", 1, "failed: a process of this run ended, rank 0 with -15, rank 1 with -9"),
    ],
    ids=["user error", "failure", "stopped", "other fails", "other is killed"],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_first_process_and_a_silent_end_is_named(
    program: str, code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(Ended) as ended:
        launch(2, 1, _command(tmp_path, program))
    assert ended.value.code == code
    assert str(ended.value).startswith(message)
    assert bool(str(ended.value)) == bool(message)
    assert time.monotonic() - began < 30
    # torch's agent has nothing to add.
    assert capfd.readouterr() == ("", "")


# A launcher of its own, which ends with the code that it should.
LAUNCHER = """
import sys
from laconic.trainer.distributed.launch import Ended, launch
try:
    launch(int(sys.argv[1]), 1, sys.argv[2:])
except Ended as ended:
    sys.exit(ended.code)
"""


def _launched(command: Sequence[str], devices: int, written: Sequence[Path]) -> subprocess.Popen[bytes]:
    """A launcher whose processes have written their files."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(devices), *command])
    for _ in range(600):
        if all(path.is_file() and path.read_text() for path in written):
            return process
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the processes did not start")


@pytest.mark.slow
def test_sigterm_to_the_launcher_lets_all_processes_finish_what_they_do(tmp_path: Path) -> None:
    program = (
        "def stop(number, frame):\n    time.sleep(1 + rank)\n    open(mine + '.saved', 'w').close()\n    sys.exit(0 if rank else 143)\n"
        "signal.signal(signal.SIGTERM, stop)\nopen(mine, 'w').write('ready')\ntime.sleep(60)"
    )
    process = _launched(_command(tmp_path, program), 2, [tmp_path / "0", tmp_path / "1"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


@pytest.mark.slow
def test_no_process_outlives_its_launcher(tmp_path: Path) -> None:
    program = (
        "from laconic.trainer.distributed.launch import end_with_launcher\nend_with_launcher()\n"
        "open(mine, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    process = _launched(_command(tmp_path, program), 1, [tmp_path / "0"])
    started = int((tmp_path / "0").read_text())
    process.kill()
    process.wait()
    for _ in range(100):
        try:
            os.kill(started, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(started, signal.SIGKILL)
    raise AssertionError("the process goes on without its launcher")


def test_processes_are_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unstarted(2, 1)
    assert unstarted(1, 2)
    assert not unstarted(1, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not unstarted(2, 1)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not unstarted(2, 1)


def test_a_run_of_several_processes_watches_its_launcher_before_it_starts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def started(*_: Any) -> None:
        done.append("launch")
        raise Ended("", 3)

    monkeypatch.setattr(run, "end_with_launcher", lambda: done.append("watch"))
    monkeypatch.setattr(run, "launch", started)
    with pytest.raises(Ended):
        run.train(load("vit_digits", ["trainer.devices=2", f"output={tmp_path}"]), [], Console(quiet=True))
    assert done == ["watch", "launch"]
