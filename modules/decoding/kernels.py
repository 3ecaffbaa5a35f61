"""Which attention kernels serve a forward with a RoutedCache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .cache import RoutedCache


def kernels_for(cache: Any) -> AbstractContextManager[None]:
    """A context without cuDNN's attention if the cache is a RoutedCache on a GPU.

    cuDNN prepares a plan for every new shape, which takes milliseconds. With a RoutedCache nearly every layer of every step has another
    number of keys: preparing took four fifths of the time of decoding eight rows.
    """
    planned = isinstance(cache, RoutedCache) and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    return _without_plans() if planned else nullcontext()


@contextmanager
def _without_plans() -> Iterator[None]:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
