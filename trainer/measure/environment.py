"""Versions and devices."""

from __future__ import annotations

from typing import Any

import torch

from .report import versions


def environment() -> dict[str, Any]:
    """Versions and devices for a bug report."""
    found: dict[str, Any] = dict(versions())
    found["cpu_threads"] = torch.get_num_threads()
    found["cuda"] = torch.version.cuda or "none"
    found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"]
    return found
