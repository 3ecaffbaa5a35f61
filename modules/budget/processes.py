"""Means over the processes of a training run, whoever has started them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, distributed


def mean(value: Tensor) -> Tensor:
    """The mean over processes, with the gradient of this process's value: averaging gradients over processes then gives the gradient of the
    mean.
    """
    whole = value.detach().clone()
    distributed.all_reduce(whole)
    return value + (whole / distributed.get_world_size() - value.detach())


def over_ranks() -> Callable[[Tensor], Tensor] | None:
    """``mean`` where several processes run; None with one, which has nothing to wait for."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return mean if several else None
