"""Giving a model tensors by name: all of them or none, seen by value to have arrived."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def copy_all(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors by name, all of them or none, which ``load_state_dict`` does not: it copies what fits before it raises.

    Args:
        ours: a model's, written to.
        theirs: of the same names and shapes, in any dtype.
        where: they come from, for messages.

    Raises:
        ValueError: names or shapes differ; nothing has been copied then.
        RuntimeError: a value did not arrive: it is NaN, or two names share memory and have different values.
    """
    check_same(ours, theirs, where)
    with torch.no_grad():
        for name, value in theirs.items():
            ours[name].copy_(value)
    lost = [name for name, value in theirs.items() if not torch.equal(ours[name].cpu(), value.to(ours[name].dtype).cpu())]
    if lost:
        raise RuntimeError(f"{where}: tensors did not arrive: {', '.join(lost[:5])}")


def check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError where tensors are missing, left over or of another shape than the model's, which need not have values."""
    for kind, names in (("lacks", ours.keys() - theirs.keys()), ("has, and the model has not,", theirs.keys() - ours.keys())):
        if names:
            raise ValueError(f"{where} {kind} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}")
    for name, value in theirs.items():
        if value.shape != ours[name].shape:
            raise ValueError(f"{where}: {name} is {tuple(value.shape)}, the model's {tuple(ours[name].shape)}")


def own_memory(model: nn.Module) -> None:
    """A mapped file lies at any address, and matrix products round by address: fresh memory answers bit for bit."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
