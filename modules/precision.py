"""Float32Linear: a linear layer that always computes in float32."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off.

    It does nothing on devices without autocast (``meta``) and during export: an exported graph that names autocast cannot be loaded.
    """
    if torch.compiler.is_exporting() or not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Float32Linear(nn.Linear):
    """``nn.Linear`` in float32, also under autocast and in a model with bf16 weights.

    Scores are compared with each other, and bf16 rounds close scores to the same value. It is a module, not a function of another
    module's weight, because ZeRO-3 gathers parameters when the module that holds them is called.
    """

    def forward(self, input: Tensor) -> Tensor:
        with full_precision(input.device):
            return functional.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())
