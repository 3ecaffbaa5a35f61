"""What the processes of a run tell each other. With one process every function answers for itself, without a process group.

Small things travel over a gloo group of their own, also where tensors go by NCCL: asking every step whether somebody wants to
stop must not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import RecipeError

Value = TypeVar("Value")

# Rank 0 may measure or write for longer than any step takes, and the others wait for it.
PATIENCE = timedelta(days=2)
_control: Any = None


def start() -> None:
    """Makes the group for small things; called once by every process, when the process group is up."""
    global _control
    _control = distributed.new_group(backend="gloo", timeout=PATIENCE)


def rank() -> int:
    """Of this process in the run, 0 where there is only one."""
    return distributed.get_rank() if _control is not None else 0


def world_size() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if _control is not None else 1


def total(counts: Sequence[float]) -> list[float]:
    """Sums over ranks, one a count."""
    if world_size() == 1:
        return list(counts)
    summed = torch.tensor(counts, dtype=torch.float64)
    distributed.all_reduce(summed, group=_control)
    return summed.tolist()


def mean(value: Tensor) -> Tensor:
    """The mean over ranks, with the gradient of this rank's value: averaging gradients over ranks then gives that of the mean.

    Needs no ``start``: it works in any process group, another trainer's too.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    whole = value.detach().clone()
    distributed.all_reduce(whole)
    return value + (whole / distributed.get_world_size() - value.detach())


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on some rank; the same answer on all of them."""
    return total([float(flag)])[0] > 0


def gather(value: Value) -> list[Value]:
    """The value of every rank, in order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_control)
    return values


def from_rank_zero(function: Callable[[], Value]) -> Value:
    """What the function returns on rank 0, on every rank; it runs nowhere else.

    Raises:
        RecipeError: on every rank, where it was raised on rank 0: one of them alone would leave the others waiting.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except RecipeError as error:
            answer[1] = str(error)
    distributed.broadcast_object_list(answer, src=0, group=_control)
    if answer[1] is not None:
        raise RecipeError(answer[1])
    result: Value = answer[0]
    return result


def wait() -> None:
    """Until every rank has come here."""
    if world_size() > 1:
        distributed.barrier(group=_control)
