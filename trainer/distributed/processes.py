"""How the processes of a run come to be: started here, by torchrun, or by SLURM; and how they find each other.

Laconic starts the processes of one machine itself, before anything is built, by repeating ``laconic train`` with the same recipe
and overrides. Lightning's launcher would repeat ``sys.argv`` in the middle of the first arm, when rank 0 has already read and
changed the run folder, and a model cannot be built in shards before the process group is up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import distributed

from ..errors import RecipeError
from . import collective

PARENT = "LACONIC_PARENT"
# How long the others may take to end by themselves once one has ended; they fail at their next exchange.
GRACE_SECONDS = 20


def environment(processes: int) -> ClusterEnvironment:
    """Who starts the processes: torchrun, SLURM's srun, or Laconic itself.

    Args:
        processes: of the run; a single one in a SLURM allocation without srun is not SLURM's.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and (processes > 1 or "SLURM_STEP_ID" in os.environ):
        # Requeueing is the scheduler's; ``--resume auto`` goes on from where SIGTERM stopped.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def local_processes() -> int | None:
    """Processes that torchrun or SLURM started on this machine; None where neither did."""
    if TorchElasticEnvironment.detect():
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:
        return int(os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("SLURM_NTASKS", "1"))
    return None


def check_environment(devices: int, num_nodes: int) -> None:
    """Raises RecipeError where torchrun or SLURM started another number of processes than the recipe asks for."""
    world = devices * num_nodes
    asked = f"trainer.devices = {devices} × trainer.num_nodes = {num_nodes}"
    if TorchElasticEnvironment.detect():
        started, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if (started, local) != (world, devices):
            raise RecipeError(
                f"torchrun started {started} processes, {local} on this machine, and the recipe asks for {asked}: give "
                f"trainer.devices={local} trainer.num_nodes={max(1, started // local)}, or torchrun --nproc_per_node={devices} "
                f"--nnodes={num_nodes}"
            )
    elif isinstance(environment_or_error(world), SLURMEnvironment):
        tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        if (tasks, nodes) != (world, num_nodes):
            raise RecipeError(
                f"SLURM starts {tasks} processes on {nodes} nodes, and the recipe asks for {asked}: give "
                f"trainer.devices={max(1, tasks // nodes)} trainer.num_nodes={nodes}, or srun --nodes={num_nodes} "
                f"--ntasks-per-node={devices}"
            )
    elif num_nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if missing:
            raise RecipeError(
                f"trainer.num_nodes = {num_nodes}: {', '.join(missing)} is not set, and neither torchrun nor SLURM runs this; start it "
                "with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on every machine"
            )


def environment_or_error(processes: int) -> ClusterEnvironment:
    """``environment``, with what Lightning finds wrong in SLURM's variables as RecipeError."""
    try:
        return environment(processes)
    except RuntimeError as error:
        raise RecipeError(f"SLURM: {error}") from None


@contextlib.contextmanager
def started(devices: int, num_nodes: int, group: bool, command: Sequence[str]) -> Iterator[None]:
    """Inside, all processes of the run are there and have found each other.

    Args:
        devices: processes on this machine.
        num_nodes: machines.
        group: whether a process group is needed; always with several processes.
        command: that starts one more process of this run.
    """
    world = devices * num_nodes
    if world == 1 and not group:
        yield
        return
    if distributed.is_initialized():
        # A second run of the same program; the group stays up until the program ends.
        if distributed.get_world_size() != world:
            raise RecipeError(f"this program runs {distributed.get_world_size()} processes, the recipe asks for {world}: start a new one")
        yield
        return
    found = environment_or_error(world)
    children: list[subprocess.Popen[bytes]] = []
    if isinstance(found, LightningEnvironment):
        if "LOCAL_RANK" not in os.environ:
            children = _start_children(found, devices, command)
        elif PARENT in os.environ:
            _end_with_parent(int(os.environ[PARENT]))
    try:
        if children:
            _watch(children)
        _join_group(found, devices, num_nodes)
        yield
    finally:
        # After a failure and after the end alike: the others end by themselves, at their next exchange or as this one does.
        _end(children, GRACE_SECONDS)


def _start_children(found: LightningEnvironment, devices: int, command: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(found.main_port))
    # Threads of several processes on the same cores slow each other down.
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // devices)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = "0"
    own = {**os.environ, PARENT: str(os.getpid())}
    # Only rank 0 has something to say; what goes wrong elsewhere is on stderr.
    return [
        subprocess.Popen(command, env={**own, "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for rank in range(1, devices)
    ]


def _join_group(found: ClusterEnvironment, devices: int, num_nodes: int) -> None:
    cuda = torch.cuda.is_available()
    local = found.local_rank()
    rank = found.node_rank() * devices + local if isinstance(found, LightningEnvironment) else found.global_rank()
    os.environ.setdefault("MASTER_ADDR", found.main_address)
    os.environ.setdefault("MASTER_PORT", str(found.main_port))
    # DeepSpeed reads its place from these, whoever started the process.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(devices * num_nodes))
    if cuda:
        torch.cuda.set_device(local)
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=devices * num_nodes,
        device_id=torch.device("cuda", local) if cuda else None,
    )
    collective.start()


def _end_with_parent(parent: int) -> None:
    """Ends this process when the one that started it is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _watch(children: list[subprocess.Popen[bytes]]) -> None:
    """Ends the run when one of its processes has failed and rank 0 does not notice by itself."""

    def watch() -> None:
        while not any(child.poll() for child in children):
            if all(child.poll() == 0 for child in children):
                return
            time.sleep(0.5)
        time.sleep(GRACE_SECONDS)
        codes = ", ".join(f"rank {rank} with {child.poll()}" for rank, child in enumerate(children, 1) if child.poll())
        sys.stderr.write(f"failed: a process of this run ended, {codes}; what it said is above\n")
        sys.stderr.flush()
        _end(children, 0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Waits for the others, at most so long, then kills them."""
    limit = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
