"""A linear layer that computes in float32 whatever surrounds it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off.

    A device such as ``meta`` has none. A graph that is exported has none to switch either, and those that name one cannot be loaded.
    """
    if torch.compiler.is_exporting() or not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Float32Linear(nn.Linear):
    """``nn.Linear`` in float32, under autocast and in a model of bf16 weights too.

    Scores are compared with each other, and bf16 cannot tell neighbours apart. It is a module, not a function of another module's
    weight, because ZeRO-3 gathers parameters where the module that holds them is called.
    """

    def forward(self, input: Tensor) -> Tensor:
        with full_precision(input.device):
            return functional.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())
