"""Parts of a composite model (vision tower, projector, language model): which are frozen, and the learning rate of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...modules.backbones import families
from ...modules.checkpoints.lora import is_lora
from ...modules.stage import stages_of
from ..errors import RecipeError
from ..recipe.schema import OptimizerRecipe, Recipe
from .optimization import parameter_groups


def part_names(model_type: str) -> tuple[str, ...]:
    """Names of the parts of a family's models, in running order; empty for a model of one part."""
    adapter = families().get(model_type)
    return (*adapter.parts_at, adapter.stack_name) if adapter is not None and adapter.parts_at else ()


def parts_of(model: PreTrainedModel) -> dict[str, str]:
    """Part of each parameter by its name; empty for a model of one part."""
    adapter = families().get(model.config.model_type)
    return adapter.parts(model) if adapter is not None and adapter.parts_at else {}


def check_part_lr(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises RecipeError if ``optimizer.part_lr`` or ``lora.parts`` names no part of the model."""
    known = part_names(config.model_type)
    named = {"optimizer.part_lr": [*recipe.optimizer.part_lr], "lora.parts": [] if recipe.lora is None else recipe.lora.parts or []}
    for key, names in named.items():
        if names and not known:
            raise RecipeError(
                f"{key} is for models of several parts (vision, projector, text), and a {config.model_type} has one: remove it, and set "
                f"{'optimizer.lr' if key == 'optimizer.part_lr' else 'lora.targets'}"
            )
        if unknown := [name for name in names if name not in known]:
            raise RecipeError(f"{key} names {unknown[0]!r}, which is no part of a {config.model_type}: the parts are {', '.join(known)}")


def freeze_parts(recipe: Recipe, model: PreTrainedModel) -> None:
    """Freezes the parts whose ``optimizer.part_lr`` is 0, in place; their routers train. LoRA is in the model already.

    Raises:
        RecipeError: a part gets a learning rate and has nothing that trains, a frozen part gets LoRA or trains in full by ``lora``, or
            nothing trains at all.
    """
    rates, parts = recipe.optimizer.part_lr, parts_of(model)
    if not rates:
        return
    of_stages = {id(parameter) for stage in stages_of(model).values() for parameter in stage.parameters()}
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_stages}
    freezes = recipe.lora is not None and recipe.lora.freezes
    for part, rate in rates.items():
        trained = {name: parameter for name, parameter in own.items() if parts[name] == part}
        if rate > 0 and not trained:
            raise RecipeError(
                f"optimizer.part_lr.{part} = {rate} has no effect: lora.mode = {recipe.lora.mode!r} freezes all of this part: "  # type: ignore[union-attr]
                f"add LoRA there with lora.parts, name modules of it in lora.modules_to_save, or remove the key"
            )
        if rate == 0 and trained and freezes:
            how = "lora.parts or lora.targets" if any(is_lora(name) for name in trained) else "lora.modules_to_save"
            raise RecipeError(
                f"optimizer.part_lr.{part} = 0 freezes what lora trains there, {next(iter(trained))} for example: take it out of {how}"
            )
        for parameter in trained.values() if rate == 0 else ():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()) and not recipe.compression:
        raise RecipeError("optimizer.part_lr is 0 for every part, and the recipe has no routers: nothing would train")


def groups_of(model: PreTrainedModel, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """The optimizer's groups of a recipe, as ``parameter_groups`` makes them."""
    return parameter_groups(
        model,
        recipe.lr,
        recipe.router_lr,
        recipe.weight_decay,
        recipe.layer_decay,
        recipe.lora_lr,
        recipe.router_weight_decay,
        recipe.lora_weight_decay,
        recipe.part_lr,
    )


def optimizer_of(model: PreTrainedModel, recipe: OptimizerRecipe, fused: bool) -> torch.optim.AdamW:
    """The optimizer of a training step.

    Args:
        model: dense or compressed model.
        recipe: its settings.
        fused: one kernel for all parameters. Lightning cannot clip the gradients of a fused optimizer under autocast.
    """
    return torch.optim.AdamW(groups_of(model, recipe), betas=recipe.betas, fused=fused)


def rates_of(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Learning rate by name of a group, with and without weight decay in one; the layers of ``layer_decay`` are left out."""
    rates: dict[str, float] = {}
    for group in groups:
        name = str(group["name"]).removesuffix("_no_decay")
        if not name.endswith("_below"):
            rates.setdefault(name, float(group["lr"]))
    return rates


def described(counts: Mapping[str, Mapping[str, int]], rates: Mapping[str, float]) -> str:
    """One line of what trains: ``projector 96 of 96 at 0.001; vision 0 of 1,024, frozen; …``.

    Args:
        counts: ``total`` and ``trainable`` parameters by group.
        rates: learning rates, the result of ``rates_of``; empty leaves them out.
    """
    said = []
    for name, count in counts.items():
        if not count["total"]:
            continue
        line = f"{name} {count['trainable']:,} of {count['total']:,}"
        if rates:
            of_lora = {rate for group, rate in rates.items() if group.split("_")[0] == "lora"}
            given = {"routers": {rates.get("router")}, "lora": of_lora}.get(name, {rates.get(name, rates.get("backbone"))})
            found = " and ".join(f"{rate:g}" for rate in sorted(given - {None}))  # type: ignore[type-var]
            line += f" at {found}" if count["trainable"] and found else ", frozen"
        said.append(line)
    return "; ".join(said)
