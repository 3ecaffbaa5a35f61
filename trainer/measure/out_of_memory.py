"""Errors that say that the memory is not enough."""

from __future__ import annotations

import torch

# torch's allocator of the CPU raises a RuntimeError of no kind of its own.
_ON_CPU = ("not enough memory", "can't allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """True if an error says that the device's or the machine's memory is not enough."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _ON_CPU)
    )
