"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from ...modules.backbones import adapter_of
from ...modules.checkpoints.lora import is_lora
from ...modules.stage import Stage
from ..distributed.zero3 import shape_of


def parameter_groups(
    model: nn.Module,
    lr: float,
    router_lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    lora_lr: float | None = None,
    router_weight_decay: float | None = None,
    lora_weight_decay: float | None = None,
    part_lr: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: backbone (or its parts), routers and LoRA, each with and without weight decay.

    Args:
        model: compressed or dense model.
        lr: learning rate of the backbone.
        router_lr: learning rate of every stage's parameters; None uses ``lr``.
        weight_decay: weight decay of matrices; norms, biases, tokens and position embeddings have none.
        layer_decay: factor on ``lr`` from each layer to the one below it, 1 after the layers (arXiv 2106.08254); routers and LoRA
            keep their rate. None uses one learning rate for the whole backbone, and then any torch module is accepted.
        lora_lr: learning rate of LoRA's parameters; None uses ``lr``.
        router_weight_decay: weight decay of routers' matrices; None uses ``weight_decay``.
        lora_weight_decay: weight decay of LoRA's matrices; None uses ``weight_decay``.
        part_lr: learning rate of parts of a composite model (``vision``, ``projector``, ``text``), and of LoRA in them; routers keep
            their rate. Each of these parts has groups of its name, and LoRA in it of the name ``lora_PART``.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``; empty groups and frozen parameters are left out.
        With ``layer_decay`` the head's groups come first, and each layer has two.
    """
    of_stages = {id(parameter) for module in model.modules() if isinstance(module, Stage) for parameter in module.parameters()}
    depths = {} if layer_decay is None else layer_depths(model)
    rates = {"router": lr if router_lr is None else router_lr, "lora": lr if lora_lr is None else lora_lr}
    decays = {"router": router_weight_decay, "lora": lora_weight_decay}
    parts = adapter_of(model).parts(model) if part_lr and isinstance(model, PreTrainedModel) else {}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "router" if id(parameter) in of_stages else "lora" if is_lora(name) else "backbone"
        plain = len(shape_of(parameter)) < 2 or "embedding" in name.rsplit(".", 1)[-1] or name.endswith("_token")
        depth = depths.get(id(parameter), 0) if kind == "backbone" else 0
        key = f"{kind}_{depth}_below" if depth else kind
        rate = rates.get(kind, lr * (layer_decay or 1.0) ** depth)
        if part_lr and kind != "router" and (part := parts.get(name, "")) in part_lr:
            key, rate = part if kind == "backbone" else f"{kind}_{part}", part_lr[part]
        given = decays.get(kind)
        decay = 0.0 if plain else weight_decay if given is None else given
        key += "_no_decay" if plain else ""
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not depths:
        return list(groups.values())
    # The head's groups come first, because the logged learning rate is that of the first group.
    return sorted(groups.values(), key=lambda group: (group["name"].startswith("router"), -group["lr"]))


def layer_depths(model: nn.Module) -> dict[int, int]:
    """Distance of each parameter from the head, by id: 0 after the layers, 1 in the last layer …, layers + 1 before the first.

    Raises:
        ValueError: the model is not a transformers model, or its family has no backbone adapter.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"optimizer.layer_decay needs a transformers model with a backbone adapter, not {type(model).__name__}")
    adapter = adapter_of(model)
    layers = adapter.layers(model)
    depths = {id(parameter): len(layers) - index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    for parameter in adapter.base(model).parameters():
        if id(parameter) in depths:
            break
        # Models register modules in the order of computation: modules before the layers are embeddings.
        depths[id(parameter)] = len(layers) + 1
    return depths


def learning_rate_schedule(optimizer: Optimizer, kind: str, total_steps: int, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Linear warm-up, then ``cosine``, ``linear`` or ``constant``.

    The warm-up is implemented here: transformers' schedules start at a learning rate of 0, so that the first step trains nothing, or
    (``cosine_warmup_with_min_lr``) start the cosine one step late.

    Args:
        optimizer: optimizer whose learning rates are the peaks.
        kind: schedule after the warm-up.
        total_steps: optimizer steps.
        warmup: fraction of the steps for the warm-up.
        final: final learning rate ÷ peak; ignored by ``constant``.
    """
    if kind not in ("cosine", "linear", "constant"):
        raise ValueError(f"optimizer.schedule = {kind!r} must be one of cosine, linear, constant")
    steps = math.ceil(warmup * total_steps)
    rest = max(1, total_steps - steps)
    decay = _decay(optimizer, kind, rest, final)

    def factor(step: int) -> float:
        return (step + 1) / steps if step < steps else decay(min(step - steps, rest))

    return LambdaLR(optimizer, factor)


def _decay(optimizer: Optimizer, kind: str, steps: int, final: float) -> Callable[[int], float]:
    """Factor on the peak learning rate by step after the warm-up, from 0 to ``steps``."""
    if kind == "linear" and final > 0:
        # transformers' linear schedule ends at 0, and its polynomial one takes one final learning rate for all groups.
        return lambda step: 1 - (1 - final) * (step / steps)
    name, options = ("cosine_with_min_lr", {"min_lr_rate": final}) if kind == "cosine" else (kind, None)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps, scheduler_specific_kwargs=options)
    decay: Callable[[int], float] = schedule.lr_lambdas[0]
    return decay
