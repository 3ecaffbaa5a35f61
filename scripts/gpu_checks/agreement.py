"""Whether the device computes what the CPU does, and fused attention serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .models import DEVICE, autocast, images, loss_of, vit, vit_stages
from .part import Setting

ROOT = Path(__file__).resolve().parents[2]


def parts_equal_the_cpu(setting: Setting) -> dict[str, Any]:
    """Every method × every family: decisions, answers, gradients and generation as on the CPU, and finite steps in bf16."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "6" if DEVICE == "cuda" else "0", "--tb=line", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(ROOT / "tests" / "cuda")], cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # 5: nothing was collected, since there is no such device.
    assert done.returncode in ((0,) if DEVICE == "cuda" else (0, 5)), f"{last}\n" + "\n".join(failed[:40]) + done.stderr[-500:]
    return {"tests": last}


def fused_attention_in_bf16(setting: Setting) -> dict[str, Any]:
    """A step under bf16 autocast has finite gradients where torch's unfused attention is off."""
    size, found = setting.sizes["vit"], {}
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    cases: dict[str, Callable[[], nn.Module]] = {
        "evidence": lambda: vit(size, vit_stages(size["depth"])),
        "key_bias": lambda: vit(size, vit_stages(size["depth"], scorer="learned", estimator="key_bias")),
        "fuse": lambda: vit(size, vit_stages(size["depth"], scorer="learned", merger="fuse")),
        "threshold": lambda: vit(size, vit_stages(size["depth"], scorer="learned", selector="threshold")),
    }
    for name, make in cases.items():
        model = make().train()
        with sdpa_kernel(fused if DEVICE == "cuda" else [SDPBackend.MATH]), autocast():
            loss = loss_of(model, images(size), True)
        loss.backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None), name
        found[name] = loss.item()
    return {"losses": found}


PARTS = (parts_equal_the_cpu, fused_attention_in_bf16)
