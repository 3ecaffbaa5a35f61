"""Starts the processes of a run on this machine with torchrun's own API, by repeating ``laconic train`` in each of them.

That happens before anything is built: a model cannot be built in shards before the process group is up, and Lightning's launcher would
repeat ``sys.argv`` when the first process has already read and changed the run folder. torch's elastic agent, in the process that was
launched, watches the processes, ends all of them when one fails, and forwards signals to them.

Done here, because the agent does it otherwise:

- Exit code and message. torchrun ends with 1 and a traceback of its own, whatever the processes ended with.
- A process ends with its launcher (``end_with_launcher``). The agent starts processes in sessions of their own, and when it is killed by
  SIGKILL they go on training.
- Threads. torchrun gives every process one; here the cores are shared out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from . import collective

# Variable with the process id of the launcher, for the processes that it started.
LAUNCHER = "LACONICLAUNCHER"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Ended(Exception):
    """The processes of this machine did not end well.

    Args:
        message: what there is to say; empty where a process has said it.
        code: exit code for this program.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def launch(devices: int, num_nodes: int, command: Sequence[str]) -> None:
    """Runs the processes of this machine, and returns when all of them have ended well.

    They find their place in the variables that torchrun sets. The stdout of the first one is shown, and the stderr of all.

    Args:
        devices: processes on this machine.
        num_nodes: machines. Of several, each has MASTER_ADDR, MASTER_PORT and NODE_RANK in its environment, and launches for itself.
        command: of a process: program and arguments.

    Raises:
        Ended: one of them failed, or a signal ended them.
    """
    with tempfile.TemporaryDirectory() as logs, _as_launcher(devices):
        config = LaunchConfig(
            min_nodes=num_nodes,
            max_nodes=num_nodes,
            nproc_per_node=devices,
            run_id="laconic",
            max_restarts=0,
            # A file is where torch can put what is not to be shown.
            logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, devices), Std.OUT)),
            # Of a signal: writing a checkpoint may take longer than torch's 30 seconds.
            shutdown_timeout=int(collective.PATIENCE.total_seconds()),
            **_rendezvous(num_nodes),
        )
        try:
            # torch would replace ${local_rank} in the arguments.
            elastic_launch(config, command[0])(*(item.replace("$", "$$") for item in command[1:]))
        except SignalException as stopped:
            raise Ended("", 128 + stopped.sigval) from None
        except ChildFailedError as error:
            raise _ended(error.failures) from None


def _rendezvous(num_nodes: int) -> dict[str, Any]:
    """How the agents of all machines find each other, as torchrun's ``--standalone`` and its static rendezvous do."""
    if num_nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "127.0.0.1"}
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        "rdzv_configs": {"rank": int(os.environ["NODE_RANK"])},
    }


def _ended(failures: Mapping[int, ProcessFailure]) -> Ended:
    """Whoever exits by itself has said why, and the first process of the machine says it for all."""
    first = next((failure.exitcode for failure in failures.values() if failure.local_rank == 0), 0)
    # SIGTERM is how the agent ends those that are left.
    others = [failure for failure in failures.values() if failure.local_rank != 0 and failure.exitcode != -signal.SIGTERM]
    if first > 0 and not others:
        return Ended("", first)
    codes = ", ".join(f"rank {rank} with {failure.exitcode}" for rank, failure in sorted(failures.items()))
    return Ended(f"failed: a process of this run ended, {codes}; what it said is above", max(1, first))


@contextlib.contextmanager
def _as_launcher(devices: int) -> Iterator[None]:
    """Inside, this process is a launcher: what torch's agent changes in it is put back, and what the agent logs is left to ``Ended``."""
    variables, disabled = dict(os.environ), logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    os.environ[LAUNCHER] = str(os.getpid())
    # Threads of several processes on the same cores slow each other down.
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // devices)))
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        os.environ.clear()
        os.environ.update(variables)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def end_with_launcher() -> None:
    """Ends this process when the one that launched it is gone, however it went; nothing where neither ``launch`` nor a
    comparison started it."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
