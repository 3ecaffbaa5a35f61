"""Runs the trainings of a comparison, each in a process of its own, several at once."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from rich.console import Console

from ..callbacks.progress import clock
from ..distributed.launch import LAUNCHER
from ..distributed.signals import Stopped, StopSignals
from ..errors import RecipeError
from ..recipe.schema import TrainerRecipe
from .job import Job

# Seconds between looks at the processes.
_PATIENCE = 0.2
# Lines of a failed training's output in the message.
_SHOWN = 30


class Failed(Exception):
    """A training of a comparison ended without its report."""


@dataclass
class _Running:
    """A training that runs.

    Attributes:
        job: the training.
        process: its process.
        slot: which of the places for trainings it has, from 0.
        began: time of its start.
        errors: file of its stderr.
    """

    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    began: float
    errors: IO[bytes]


def run_all(jobs: Sequence[Job], at_once: int, console: Console) -> None:
    """Trains what is not trained yet; a training that was interrupted goes on from its newest checkpoint.

    Args:
        jobs: all trainings of the comparison.
        at_once: number of trainings that run at the same time.
        console: console for progress.

    Raises:
        Failed: a training failed. Others that run are stopped and save a checkpoint.
        Stopped: a signal ended the comparison; the trainings have saved a checkpoint.
    """
    waiting = [job for job in jobs if not job.done]
    if kept := len(jobs) - len(waiting):
        console.print(f"{kept} of {len(jobs)} runs have ended before and are kept", highlight=False)
    running: list[_Running] = []
    taken: list[tuple[str, float]] = []
    with contextlib.ExitStack() as files, StopSignals().handled() as signals, signals.deferred(), _ending(running):
        while waiting or running:
            if signals.received is not None:
                raise Stopped(signals.received, f"stopped by {signal.Signals(signals.received).name}; repeat the same command to continue")
            free = [slot for slot in range(at_once) if all(other.slot != slot for other in running)]
            while waiting and free:
                started = _start(waiting.pop(0), free.pop(0), at_once, files.enter_context(tempfile.TemporaryFile()))
                running.append(started)
                again = ", goes on" if any(started.job.run.checkpoints.glob("*.ckpt")) else ""
                console.print(f"{started.job.title}: begins{again}; {started.job.run.log}", highlight=False, soft_wrap=True)
            time.sleep(_PATIENCE)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                _check(item)
                taken.append((item.job.arm, time.monotonic() - item.began))
                left = time_left(
                    [job.arm for job in waiting], [(one.job.arm, time.monotonic() - one.began) for one in running], taken, at_once
                )
                runs = f"{len(waiting) + len(running)} of {len(jobs)} runs{f' and about {clock(left)}' if left else ''} left"
                console.print(f"{item.job.title}: ended after {clock(taken[-1][1])}; {runs}", highlight=False, soft_wrap=True)


def time_left(waiting: Sequence[str], running: Sequence[tuple[str, float]], taken: Sequence[tuple[str, float]], at_once: int) -> float:
    """Estimated seconds until the last training ends.

    Args:
        waiting: arms of the trainings that have not begun.
        running: arm, and seconds since its start, of those that run.
        taken: arm, and seconds from start to end, of those that have ended; at least one.
        at_once: number of trainings at the same time.
    """
    mean = statistics.mean(seconds for _, seconds in taken)
    by_arm = {arm: statistics.mean(seconds for name, seconds in taken if name == arm) for arm, _ in taken}
    left = sum(by_arm.get(arm, mean) for arm in waiting) + sum(max(0.0, by_arm.get(arm, mean) - since) for arm, since in running)
    return left / min(at_once, max(1, len(waiting) + len(running)))


def threads(at_once: int) -> int:
    """Threads of a training that computes on the CPU.

    Args:
        at_once: number of trainings at the same time.
    """
    return torch.get_num_threads() if at_once == 1 else max(1, len(os.sched_getaffinity(0)) // at_once)


def environment(slot: int, at_once: int) -> dict[str, str]:
    """Environment of a training: its share of the cores as threads, and one of several GPUs if several run at the same time.

    Args:
        slot: its place among those that run at the same time.
        at_once: number of these places.
    """
    # Should this process be killed, its trainings end too: they would hold their folders.
    variables = {**os.environ, LAUNCHER: str(os.getpid())}
    if at_once > 1:
        variables["OMP_NUM_THREADS"] = str(threads(at_once))
        if (devices := torch.cuda.device_count()) > 1:
            given: Mapping[int, str] = dict(enumerate(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
            variables["CUDA_VISIBLE_DEVICES"] = given.get(slot % devices) or str(slot % devices)
    return variables


def check_at_once(trainer: TrainerRecipe, at_once: int) -> None:
    """Raises RecipeError if trainings of several processes each are to run at the same time."""
    if at_once > 1 and (trainer.devices != 1 or trainer.num_nodes > 1):
        raise RecipeError(
            f"--jobs {at_once}: trainer.devices = {trainer.devices} × trainer.num_nodes = {trainer.num_nodes} processes train one run: set "
            "--jobs 1, or trainer.devices=1"
        )


def _start(job: Job, slot: int, at_once: int, errors: IO[bytes]) -> _Running:
    # A session of its own: Ctrl-C reaches this process alone, which asks each training once to save and end.
    process = subprocess.Popen(
        job.command,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        stdin=subprocess.DEVNULL,
        env=environment(slot, at_once),
        start_new_session=True,
    )
    return _Running(job, process, slot, time.monotonic(), errors)


@contextlib.contextmanager
def _ending(running: Sequence[_Running]) -> Iterator[None]:
    """Context whose end, by a signal or an error, ends the trainings that still run, after they have saved a checkpoint."""
    try:
        yield
    finally:
        for item in running:
            item.process.terminate()
        for item in running:
            item.process.wait()


def _check(item: _Running) -> None:
    """Raises Failed unless a training that ended has written its report."""
    item.errors.seek(0)
    said = item.errors.read().decode(errors="replace").strip().splitlines()[-_SHOWN:]
    if item.process.returncode or not item.job.done:
        raise Failed("\n".join([f"{item.job.title} ended with exit code {item.process.returncode}", " ".join(item.job.command), *said]))
