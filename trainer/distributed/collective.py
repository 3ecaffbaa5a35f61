"""Collectives between the processes of a run. With one process each function returns at once, without a process group.

Small values use a separate gloo group, even if tensors use NCCL: exchanging the stop signal at every step must not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from ...modules.checkpoints.whole_files import DamagedFile
from ..errors import RecipeError

Value = TypeVar("Value")

# Rank 0 may measure or write for longer than a step takes, while the others wait.
PATIENCE = timedelta(days=2)
_control: Any = None


def start() -> None:
    """Creates the gloo group; called once by every process, after the process group exists."""
    global _control
    _control = distributed.new_group(backend="gloo", timeout=PATIENCE)


def end() -> None:
    """Waits for all ranks, and forgets the group."""
    global _control
    wait()
    _control = None


def rank() -> int:
    """Rank of this process in the run; 0 with one process."""
    return distributed.get_rank() if _control is not None else 0


def world_size() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if _control is not None else 1


def total(counts: Sequence[float]) -> list[float]:
    """Element-wise sum over ranks."""
    if world_size() == 1:
        return list(counts)
    summed = torch.tensor(counts, dtype=torch.float64)
    distributed.all_reduce(summed, group=_control)
    return summed.tolist()


def largest(values: Sequence[float]) -> list[float]:
    """Element-wise maximum over ranks."""
    if world_size() == 1:
        return list(values)
    most = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(most, distributed.ReduceOp.MAX, group=_control)
    return most.tolist()


def any_rank(flag: bool) -> bool:
    """True on all ranks if the flag is True on any rank."""
    return total([float(flag)])[0] > 0


def gather(value: Value) -> list[Value]:
    """The value of every rank, in order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_control)
    return values


def from_rank_zero(function: Callable[[], Value]) -> Value:
    """Runs the function on rank 0 and returns its result on every rank.

    Raises:
        RecipeError: raised on every rank if rank 0 raised it or found a damaged file, so that no rank waits for the others.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except (RecipeError, DamagedFile) as error:
            answer[1] = str(error)
    distributed.broadcast_object_list(answer, src=0, group=_control)
    if answer[1] is not None:
        raise RecipeError(answer[1])
    result: Value = answer[0]
    return result


def wait() -> None:
    """Waits until every rank has called this."""
    if world_size() > 1:
        distributed.barrier(group=_control)
