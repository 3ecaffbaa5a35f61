"""Saves an adapter: extracts the trained weights from a model with frozen base weights and writes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compressed_model import CompressedModel, check_savable
from ..layer import base_class
from ..stage import stages_of
from .adapter_folder import Adapter, write_adapter
from .base_weights import Base, base_of
from .lora import is_lora, lora_state


def save_adapter(model: PreTrainedModel, folder: str | Path, base: str | Path, revision: str | None = None) -> None:
    """Writes the trained weights of a model with frozen base weights: LoRA, routers and mergers, modules trained in full.

    Args:
        model: a model after ``compress`` and ``add_lora``, or after ``train_only``.
        folder: folder to write; it must be empty or not exist.
        base: folder or hub name of the weights that the model started from, in safetensors.
        revision: revision of a hub model.

    Raises:
        ValueError: no or all parameters are trained, the base cannot be found, or the folder is not empty.
    """
    write_adapter(adapter_of(model, base_of(base, revision)), Path(folder))


def adapter_of(
    model: PreTrainedModel,
    base: Base,
    name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    ratio: Mapping[str, Any] | None = None,
) -> Adapter:
    """The contents of a model's adapter folder.

    Args:
        model: a model after ``compress`` and ``add_lora``, or after ``train_only``.
        base: base weights that it started from.
        name: name of the LoRA adapter.
        state: the model's tensors by name, if the model itself is sharded; at least the trained ones. None takes them from the model.
        ratio: requested and achieved ratio for the manifest; None if unknown.

    Raises:
        ValueError: an adapter cannot hold the trained parameters, or no name finds a part that was given as a class or an object.
    """
    check_savable(model)
    values = dict(model.state_dict()) if state is None else dict(state)
    lora_configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    stages = stage_names(model)
    full = trained_modules(model)
    config = copy.deepcopy(model.config)
    compression = config.__dict__.pop("compression", None)
    cls = base_class(type(model)) if isinstance(model, CompressedModel) else type(model)
    config.architectures = [cls.__name__]
    return Adapter(
        base=base,
        model_class=cls.__name__,
        model_config=config.to_dict(),
        lora_config=lora_configs.get(name),
        lora=lora_state(model, name, values) if name in lora_configs else {},
        compression=compression,
        stages={key: value for key, value in values.items() if any(key.startswith(f"{stage}.") for stage in stages)},
        full=tuple(full),
        full_tensors={key: value for key, value in values.items() if any(key.startswith(f"{module}.") for module in full)},
        ratio={} if ratio is None else ratio,
    )


def trained_modules(model: nn.Module) -> list[str]:
    """Names of the modules that are trained in full besides LoRA and routers.

    Raises:
        ValueError: only a part of a module is trained, or all parameters are.
    """
    stages = stage_names(model)
    # Tied parameters by all of their names: PEFT loads each module into a copy of its own.
    parameters = model.named_parameters(remove_duplicate=False)
    free = [name for name, parameter in parameters if parameter.requires_grad and not is_lora(name)]
    owners = sorted({name.rpartition(".")[0] for name in free if not any(name.startswith(f"{stage}.") for stage in stages)})
    for owner in owners:
        if not owner or not all(parameter.requires_grad for parameter in model.get_submodule(owner).parameters()):
            raise ValueError(
                f"{owner or 'a parameter of the model itself'} trains in part, which an adapter cannot hold: call add_lora or train_only, "
                "or save the whole model"
            )
    return owners


def stage_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers of routers and mergers by name; they share memory with the model."""
    stages = stage_names(model)
    return {key: value for key, value in model.state_dict().items() if any(key.startswith(f"{stage}.") for stage in stages)}


def stage_names(model: nn.Module) -> list[str]:
    """Names of the modules that are stages."""
    stages = {id(stage) for stage in stages_of(model).values()} if isinstance(model, PreTrainedModel) else set()
    return [name for name, module in model.named_modules() if id(module) in stages]
