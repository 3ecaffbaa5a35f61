"""Who starts the processes of a run, torchrun, SLURM or Laconic (``launch``), and how they find each other."""

from __future__ import annotations

import os

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import distributed

from ..errors import RecipeError
from . import collective
from .launch import end_with_launcher


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


def unstarted(devices: int, num_nodes: int) -> bool:
    """Whether the processes of a run have still to be started on this machine: it has several, and neither torchrun nor SLURM nor
    Laconic has started this one."""
    world = devices * num_nodes
    if world == 1 or distributed.is_initialized() or "LOCAL_RANK" in os.environ:
        return False
    return isinstance(environment_or_error(world), LightningEnvironment)


def join(devices: int, num_nodes: int, group: bool) -> None:
    """Returns when all processes of the run have found each other; the process group stays up until the program ends.

    Args:
        devices: processes on this machine.
        num_nodes: machines.
        group: whether a process group is needed; always with several processes.

    Raises:
        RecipeError: the program runs another number of processes already.
    """
    end_with_launcher()
    world = devices * num_nodes
    if world == 1 and not group:
        return
    if distributed.is_initialized():
        if distributed.get_world_size() != world:
            raise RecipeError(f"this program runs {distributed.get_world_size()} processes, the recipe asks for {world}: start a new one")
        return
    _join_group(environment_or_error(world), devices, num_nodes)


def leave() -> None:
    """Takes down the process group, after all ranks have come here. For the end of a program: what is left of it then may end the process
    with a signal, although all went well."""
    if distributed.is_available() and distributed.is_initialized():
        collective.end()
        distributed.destroy_process_group()


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
