"""Estimated peak memory of ``laconic train``: its arms one after another, then the closing measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..recipe.schema import Recipe
from .validate import Checked, machine_memory

# Gradient and two moments of AdamW of a float32 parameter.
_TRAINS = 12
# Copies of an arm in the measurement: the arm, its oracle and the control, which is an equal oracle.
_COPIES = 3


@dataclass(frozen=True)
class RunMemory:
    """Estimated bytes.

    Attributes:
        training: peak while the arms train. On a CPU the weights of the arms before are in the same memory.
        bench: peak of the closing measurement; 0 without one.
        models: models of the closing measurement, which each have weights, gradients and optimizer states.
    """

    training: int
    bench: int
    models: int

    @property
    def peak(self) -> int:
        """The larger of both."""
        return max(self.training, self.bench)

    def remark(self, memory: int) -> str:
        """One line: the peak, where it is, and what to change if it exceeds a memory of so many bytes."""
        where = f"in the closing measurement of {self.models} models" if self.bench > self.training else "while an arm trains"
        cure = ""
        if self.peak > memory:
            first = "set trainer.bench_rounds=0" if self.training <= memory else "make data.batch_size smaller"
            cure = f"; this machine has {memory / 2**30:.1f} GiB: {first}"
        return f"the whole run takes about {self.peak / 2**30:.2f} GiB at its peak, {where}{cure}"


def run_memory(arms: Mapping[str, Checked], recipe: Recipe) -> RunMemory:
    """The peak of a run.

    Args:
        arms: the checked control arms in the order of their training, then the recipe itself.
        recipe: the recipe itself.
    """
    checked = list(arms.values())
    # On a device it has one arm at a time.
    shared = not torch.cuda.is_available()
    before = [sum(arm.weight_bytes for arm in checked[:index]) if shared else 0 for index in range(len(checked))]
    training = max(held + arm.memory_bytes for held, arm in zip(before, checked, strict=True))
    compressed = [arm for arm in checked if arm.keep]
    if not recipe.trainer.bench_rounds or not compressed or recipe.trainer.strategy == "deepspeed_3":
        return RunMemory(training, 0, 0)
    held = sum(arm.weight_bytes for arm in checked) if shared else 0
    copies = [compressed[0], *(arm for arm in compressed for _ in range(_COPIES))]
    states = sum(arm.weight_bytes + _TRAINS * arm.trainable for arm in copies)
    return RunMemory(training, held + states + max(arm.dense_activation_bytes for arm in compressed), len(copies))


def memory_here() -> int:
    """Bytes of the memory that a run fills: the first device's, or the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return machine_memory()
