"""Freezes the base, adds LoRA, and counts trainable parameters."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...modules.checkpoints.adapter_folder import Adapter
from ...modules.checkpoints.lora import add_lora, full_modules, is_lora, lora_state, merge_lora, outside_layers, targets_in, train_only
from ...modules.checkpoints.tensors import copy_all
from ...modules.compress import skipped_layers
from ...modules.stage import stages_of
from ..distributed.deepspeed import stage_of
from ..distributed.zero3 import shape_of
from ..errors import RecipeError
from ..recipe.schema import LoraRecipe, Recipe
from .part_rates import parts_of


def check_lora(recipe: Recipe) -> None:
    """Checks the ``lora`` block against the rest of the recipe and this machine. Raises RecipeError with one clear message."""
    lora = recipe.lora
    if lora is None or not lora.freezes:
        return
    where = f"lora.mode = {lora.mode!r}"
    if not recipe.model.has_weights:
        raise RecipeError(
            f"{where} freezes the weights of model.name, which is not set: name a folder, run or hub model with trained weights, or set "
            "lora.mode=full"
        )
    if recipe.model.resize_vocabulary:
        raise RecipeError(
            f"model.resize_vocabulary = true changes weights that {where} freezes: resize them once in Python, with "
            "model.resize_token_embeddings(len(tokenizer)) and model.save_pretrained(FOLDER), set model.name=FOLDER and "
            "lora.modules_to_save=[embed_tokens, lm_head]; or set lora.mode=full"
        )
    if recipe.model.image_scale != 1:
        raise RecipeError(
            f"model.image_scale = {recipe.model.image_scale} changes position embeddings, which {where} freezes and an adapter does not hold: "
            "train with lora.mode=full, or resize the model once, with a run of lora.mode=full and trainer.max_steps=1"
        )
    if lora.mode == "routers" and recipe.compression is None:
        raise RecipeError(f"{where} trains routers, and the recipe has no compression: add compression.stages, or set lora.mode=lora")
    if (
        lora.mode == "routers"
        and recipe.compression is not None
        and not any(stage.treats_some or not stage.bypass for stage in recipe.compression.stages)
    ):
        raise RecipeError(f"{where} trains routers, and all stages have keep = 0, which need none: set lora.mode=lora")
    if recipe.trainer.ema is not None:
        raise RecipeError(f"trainer.ema = {recipe.trainer.ema} averages all weights, and {where} trains few of them: set trainer.ema=null")
    if recipe.optimizer.layer_decay is not None:
        raise RecipeError(
            f"optimizer.layer_decay = {recipe.optimizer.layer_decay} applies to a trained backbone, and {where} freezes it: remove it"
        )
    if stage_of(recipe.trainer) == 3 and lora.dora:
        raise RecipeError(
            "lora.dora = true is not supported with deepspeed_3: DoRA reads whole weights, which are partitioned there; set "
            "lora.dora=false or trainer.strategy=deepspeed_2"
        )
    if lora.quantize is not None:
        _check_quantize(lora, stage_of(recipe.trainer))


def _check_quantize(lora: LoraRecipe, stage: int) -> None:
    given = f"lora.quantize = {lora.quantize!r}"
    if not torch.cuda.is_available():
        raise RecipeError(f"{given} needs a GPU, and torch finds none on this machine: set lora.quantize=null")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{given}: the package bitsandbytes is not installed; pip install 'laconic[quant]', or set lora.quantize=null")
    if stage == 3:
        raise RecipeError(
            f"{given} is not supported with deepspeed_3, which cannot partition 4-bit weights: set trainer.strategy=deepspeed_2"
        )


def quantization(lora: LoraRecipe | None, model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load frozen layers in 4 bits; heads, routers and LoRA stay in float32."""
    if lora is None or lora.quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        whole = outside_layers(model_class._from_config(copy.deepcopy(config)))
    settings: Any = BitsAndBytesConfig
    four = settings(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=whole,
    )
    return {"quantization_config": four, "device_map": {"": torch.cuda.current_device()}}


def train_parts(recipe: LoraRecipe | None, model: PreTrainedModel, new: Iterable[str], adapter: Adapter | None, filled: bool) -> None:
    """Freezes the parameters that do not train and adds LoRA, in place. The model has its stages already.

    Args:
        recipe: the ``lora`` block; None trains everything.
        model: model with its initial weights.
        new: modules without initial weights, which train in full.
        adapter: adapter that the run starts from; None if there is none.
        filled: False for a partitioned model whose weights are set later.

    Raises:
        ValueError: the block names modules that do not exist, or its settings differ from the adapter's.
    """
    if recipe is None or not recipe.freezes:
        if adapter is not None and filled:
            _merge_in(model, adapter)
            _copy_full(model, adapter)
    else:
        _train_few(recipe, model, new, adapter, filled)
    for name in skipped_layers(model):
        # No gradient reaches them: an optimizer would hold states for nothing, and several processes would wait for their gradients.
        for own, parameter in model.get_submodule(name).named_parameters():
            # A shortcut is in use.
            if not own.startswith("stages."):
                parameter.requires_grad_(False)


def _train_few(recipe: LoraRecipe, model: PreTrainedModel, new: Iterable[str], adapter: Adapter | None, filled: bool) -> None:
    """Freezes the base, and adds LoRA if the recipe has it."""
    full = full_modules(model, dict.fromkeys([*new, *recipe.modules_to_save, *(adapter.full if adapter is not None else ())]))
    if recipe.mode == "routers":
        train_only(model, full)
    else:
        config = recipe.peft(full)
        if recipe.parts is not None:
            config.target_modules = set(targets_in(model, recipe.parts, recipe.targets))
        add_lora(model, config)
        if adapter is not None and adapter.lora_config is not None:
            check_same_lora(model, adapter)
            if filled:
                copy_all(lora_state(model), adapter.lora, "model.name's LoRA")
    if adapter is not None and filled:
        _copy_full(model, adapter)


def check_same_lora(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raises ValueError if a recipe's LoRA differs from that of the adapter it starts from."""
    configs: Mapping[str, Any] = model.peft_config
    new, old = configs["default"].to_dict(), adapter.lora_config.to_dict()  # type: ignore[union-attr]
    keys = {
        "r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora", "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }  # fmt: skip
    for key, of_peft in keys.items():
        if new[of_peft] != old[of_peft]:
            raise ValueError(
                f"lora.{key} = {new[of_peft]!r}, and the adapter in model.name has {old[of_peft]!r}: use the same, or start from its "
                "merged export"
            )
    adapted = {name.rsplit(".lora_", 1)[0] for name in lora_state(model)}
    before = {name.rsplit(".lora_", 1)[0] for name in adapter.lora}
    if adapted != before:
        differing = sorted(name.removeprefix("base_model.model.") for name in adapted ^ before)
        raise ValueError(f"lora.targets differ from those of the adapter in model.name, in {', '.join(differing[:3])}: use the same")


def parameter_counts(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """``total`` and ``trainable`` parameters of ``lora``, ``routers`` and the ``rest``, which in a model of several parts are these parts
    by name; of whole parameters, even if partitioned."""
    counts = {group: {"total": 0, "trainable": 0} for group in ("lora", "routers", *(dict.fromkeys(parts_of(model).values()) or ["rest"]))}
    for group, parameters in grouped(model).items():
        for parameter in parameters:
            # A byte stores two 4-bit weights.
            size = shape_of(parameter).numel() * (2 if parameter.dtype == torch.uint8 else 1)
            counts[group]["total"] += size
            counts[group]["trainable"] += size * parameter.requires_grad
    return counts


def grouped(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters of ``lora``, ``routers`` and the ``rest``, or the parts of a model of several; without empty groups."""
    of_stages = {id(parameter) for stage in stages_of(model).values() for parameter in stage.parameters()}
    parts, groups = parts_of(model), dict[str, list[nn.Parameter]]()
    for name, parameter in model.named_parameters():
        group = "routers" if id(parameter) in of_stages else "lora" if is_lora(name) else parts.get(name, "rest")
        groups.setdefault(group, []).append(parameter)
    return groups


def _merge_in(model: PreTrainedModel, adapter: Adapter) -> None:
    """Merges an adapter's LoRA into the weights, which keep their ``requires_grad``."""
    if adapter.lora_config is None:
        return
    training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    add_lora(model, adapter.lora_config, "merged")
    copy_all(lora_state(model, "merged"), adapter.lora, "model.name's LoRA")
    merge_lora(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(training[name])


def _copy_full(model: PreTrainedModel, adapter: Adapter) -> None:
    """Copies an adapter's fully trained modules whose shapes fit, except those in ``new``."""
    state = model.state_dict()
    for module in adapter.full:
        tensors = {name: value for name, value in adapter.full_tensors.items() if name.startswith(f"{module}.")}
        if all(name in state and state[name].shape == value.shape for name, value in tensors.items()):
            copy_all({name: state[name] for name in tensors}, tensors, "model.name")
