"""Which attention kernels serve a forward with a RoutedCache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .cache import RoutedCache


@contextmanager
def kernels_for(cache: Any) -> Iterator[None]:
    """A context without cuDNN's attention if the cache is a RoutedCache on a GPU.

    cuDNN prepares a plan for every new shape, which takes milliseconds. With a RoutedCache nearly every layer of every step has another
    number of keys: preparing took four fifths of the time of decoding eight rows.
    """
    if not isinstance(cache, RoutedCache) or not torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
