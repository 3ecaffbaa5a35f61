"""torch.compile of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .measuring import milliseconds, ratio_of, rounds_of, timed
from .models import DEVICE, autocast, images, llm, loss_of, synchronise, tokens, vit, vit_stages
from .part import Setting


def compiled_vit(setting: Setting) -> dict[str, Any]:
    """torch.compile makes one graph of a ViT's training forward; its time beside eager."""
    size = setting.sizes["vit"]
    return _compiled(setting, {"compressed": lambda: vit(size, vit_stages(size["depth"])), "dense": lambda: vit(size)}, images(size))


def compiled_llm(setting: Setting) -> dict[str, Any]:
    """The same for a decoder with routers, which protect one token of each row: a number that the host knows."""
    size = setting.sizes["llm"]
    return _compiled(setting, {"compressed": lambda: llm(size, True, protect={"first": 1}), "dense": lambda: llm(size)}, tokens(size))


def _compiled(setting: Setting, models: dict[str, Callable[[], nn.Module]], batch: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, (name, make) in enumerate(models.items()):
        model, traced = make().train(), name == "compressed"
        losses: dict[str, Tensor] = {}

        def eager(model: nn.Module = model, traced: bool = traced) -> Tensor:
            return loss_of(model, batch, traced)

        def step(kind: str, forward: Callable[[], Tensor], model: nn.Module = model, losses: dict[str, Tensor] = losses) -> None:
            model.zero_grad(set_to_none=True)
            with autocast():
                loss = forward()
            loss.backward()
            losses[kind] = loss.detach()

        fast = torch.compile(eager, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
        calls = {
            "eager": lambda step=step, eager=eager: step("eager", eager),
            "compiled": lambda step=step, fast=fast: step("compiled", fast),
        }
        start = time.perf_counter()
        calls["compiled"]()
        synchronise()
        compiling = time.perf_counter() - start
        times = timed(setting, calls, 1 / (len(models) - place))
        ends = {kind: loss.item() for kind, loss in losses.items()}
        assert abs(ends["eager"] - ends["compiled"]) < 0.02 * abs(ends["eager"]), ends
        found[name] = {
            "eager_ms": milliseconds(times["eager"]),
            "compiled_ms": milliseconds(times["compiled"]),
            "eager_to_compiled": ratio_of(times["eager"], times["compiled"]),
            "compiling_s": compiling,
            "losses": ends,
            **rounds_of(setting, len(times["eager"])),
        }
    return found


PARTS = (compiled_vit, compiled_llm)
