"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..modules.stage import Stage
from .sharded import shape_of


def parameter_groups(model: nn.Module, lr: float, router_lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: backbone and routers, each with and without weight decay.

    Args:
        model: compressed or dense.
        lr: learning rate of the backbone.
        router_lr: learning rate of every stage's parameters; None takes ``lr``.
        weight_decay: of matrices; norms, biases, tokens and position embeddings have none.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out. Frozen parameters are in none.
    """
    of_stages = {id(parameter) for module in model.modules() if isinstance(module, Stage) for parameter in module.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        router = id(parameter) in of_stages
        plain = len(shape_of(parameter)) < 2 or "embedding" in name.rsplit(".", 1)[-1] or name.endswith("_token")
        key = ("router" if router else "backbone") + ("_no_decay" if plain else "")
        rate = router_lr if router and router_lr is not None else lr
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": 0.0 if plain else weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate_schedule(optimizer: Optimizer, kind: str, total_steps: int, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Linear warm-up, then ``cosine``, ``linear`` or ``constant``.

    Args:
        optimizer: whose groups' learning rates are the peaks.
        kind: of the schedule after the warm-up.
        total_steps: optimizer steps.
        warmup: fraction of them that warms up.
        final: learning rate at the end ÷ peak.
    """
    steps = math.ceil(warmup * total_steps)
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda progress: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda progress: 1 - (1 - final) * progress,
        "constant": lambda progress: 1.0,
    }
    if kind not in shapes:
        raise ValueError(f"optimizer.schedule = {kind!r} must be one of {', '.join(shapes)}")

    def factor(step: int) -> float:
        if step < steps:
            return (step + 1) / steps
        return shapes[kind](min(1.0, (step - steps) / max(1, total_steps - steps)))

    return LambdaLR(optimizer, factor)
