"""Copies tensors by name into a model: all or none, with a check of the copied values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def copy_all(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors by name, all or none; ``load_state_dict`` copies those that fit before it raises.

    Args:
        target: tensors of a model, written in place.
        source: tensors of the same names and shapes, in any dtype.
        where: location of the source, for messages.

    Raises:
        ValueError: names or shapes differ; nothing is copied in this case.
        RuntimeError: a copied value differs: it is NaN, or two names share memory and have different values.
    """
    check_same(target, source, where)
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)
    lost = [name for name, value in source.items() if not torch.equal(target[name].cpu(), value.to(target[name].dtype).cpu())]
    if lost:
        raise RuntimeError(f"{where}: tensors did not arrive: {', '.join(lost[:5])}")


def check_same(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError if ``source`` lacks tensors, has more, or has other shapes than ``target``, which may be on ``meta``."""
    for kind, names in (("lacks", target.keys() - source.keys()), ("has, and the model has not,", source.keys() - target.keys())):
        if names:
            raise ValueError(f"{where} {kind} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}")
    for name, value in source.items():
        if value.shape != target[name].shape:
            raise ValueError(f"{where}: {name} is {tuple(value.shape)}, the model's {tuple(target[name].shape)}")


def own_memory(model: nn.Module) -> None:
    """Copies parameters to fresh memory. A mapped file may have any address, and the rounding of matrix products depends on alignment."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
