"""LoRA besides routers, through PEFT: target modules, trainable parameters, and merging into the weights.

Compress first, then add LoRA. Routers and mergers are never LoRA targets and are trained in full.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backbones import adapter_of
from ..compress import skipped_layers
from ..stage import Stage

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
# Prefix of every name in PEFT's files.
PEFT_PREFIX = "base_model.model."
_LINEAR = (nn.Linear, Conv1D)
_ADAPTABLE = (*_LINEAR, nn.Conv2d, nn.Embedding)


def add_lora(model: PreTrainedModel, config: LoraConfig, name: str = "default") -> PreTrainedModel:
    """Adds LoRA to a model, in place; only LoRA, routers and ``config.modules_to_save`` stay trainable.

    Args:
        model: compressed model, or dense model for a control arm.
        config: PEFT's config. ``target_modules`` is a list of names or name suffixes, a regular expression, ``all-linear`` (all linear
            layers except the head), or None for the family's default, all linear layers of its transformer layers. Modules in
            ``modules_to_save`` are trained in full, in place.
        name: name of the adapter.

    Returns:
        The same object, of the same class; parameters of adapted modules are now under ``base_layer``.

    Raises:
        ValueError: a name matches nothing or a router, or the adapter's name is taken. The model is unchanged in this case.
    """
    taken = {part for key, _ in model.named_modules() for part in key.split(".") if not is_lora(key)}
    if not name.isidentifier() or name in taken or name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter name {name!r} must be a word, and none that a module or an adapter of the model has already")
    targets = lora_targets(model, config.target_modules)
    full = full_modules(model, config.modules_to_save or ())
    tied = [target for target in targets if _tied(model, target)]
    if tied:
        raise ValueError(
            f"lora.targets names {', '.join(tied)}, whose weight is tied to another module's: LoRA on one of them could not be merged "
            "without changing the other; name other modules, or untie them (tie_word_embeddings)"
        )
    both = [target for target in targets if any(_inside(target, module) for module in full)]
    if both:
        raise ValueError(f"lora.targets and lora.modules_to_save both name {', '.join(both)}: a module trained in full needs no LoRA")
    from peft import inject_adapter_in_model

    own: Any = copy.deepcopy(config)
    own.target_modules, own.modules_to_save = set(targets), None
    inject_adapter_in_model(own, model, name)
    _check_only(model, targets)
    train_only(model, full, lora=name)
    return model


def train_only(model: nn.Module, full: Iterable[str] = (), lora: str | None = None) -> None:
    """Makes only routers, mergers, the named modules and one adapter's LoRA trainable.

    Args:
        model: model with stages, LoRA, or both.
        full: exact names of modules to train in full.
        lora: name of the adapter; None trains no LoRA.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Stage):
            module.requires_grad_(True)
    for name in full:
        model.get_submodule(name).requires_grad_(True)
    for name, parameter in model.named_parameters():
        if lora is not None and re.search(rf"\.lora_\w+\.{re.escape(lora)}(\.|$)", name):
            parameter.requires_grad_(True)


def is_lora(name: str) -> bool:
    """True if a parameter belongs to LoRA, by its name in the model."""
    return any(part.startswith("lora_") for part in name.split("."))


def outside_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers outside the transformer layers of the main stack: heads, poolers, a vision tower."""
    inside = {id(module) for module in adapter_of(model).layers(model).modules()}
    return [name for name, module in model.named_modules() if isinstance(module, _LINEAR) and id(module) not in inside]


def lora_targets(model: PreTrainedModel, targets: str | Iterable[str] | None) -> list[str]:
    """Exact names of the modules that LoRA adapts, in the model's order.

    Raises:
        ValueError: a name matches nothing that LoRA can adapt, or only routers.
    """
    known = {name.replace(".base_layer", ""): module for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)}
    known = {name: module for name, module in known.items() if not is_lora(name)}
    routers = [name for name, module in model.named_modules() if isinstance(module, Stage)]
    free = {name: module for name, module in known.items() if not any(_inside(name, router) for router in routers)}
    linear = [name for name, module in free.items() if isinstance(module, _LINEAR)]
    if targets is None:
        stack = adapter_of(model).main_stack(model)
        layers = next(name for name, module in model.named_modules() if module is stack.layers)
        ends, skipped = stack.adapter.lora_targets, skipped_layers(model)
        run = [name for name in linear if _inside(name, layers) and not any(_inside(name, layer) for layer in skipped)]
        return [name for name in run if ends is None or _matches(name, ends)]
    if targets == ALL_LINEAR:
        # All linear layers of the base model, if the model has a head besides it.
        base = adapter_of(model).base(model)
        inside = next(name for name, module in model.named_modules() if module is base)
        return [name for name in linear if not inside or _inside(name, inside)]
    if isinstance(targets, str):
        found = [name for name in free if re.fullmatch(targets, name)]
        return found or _nothing([targets], known, free)
    requested = list(targets)
    unknown = [target for target in requested if not any(_matches(name, (target,)) for name in free)]
    if unknown or not requested:
        _nothing(unknown, known, free)
    return [name for name in free if _matches(name, requested)]


def targets_in(model: PreTrainedModel, parts: Iterable[str], targets: str | Iterable[str] | None = None) -> list[str]:
    """Exact names of the modules that LoRA adapts in parts of a composite model, in the model's order.

    Args:
        model: model of several parts.
        parts: names of parts: ``vision``, ``projector``, ``text``.
        targets: as for ``lora_targets``, of which those in the parts are taken; None takes every linear layer that runs.

    Raises:
        ValueError: a part has no such module.
    """
    adapter, found = adapter_of(model), list[str]()
    of_module = {name.rpartition(".")[0]: part for name, part in adapter.parts(model).items()}
    # A tower's layers behind the one that the projector reads do not run.
    stacks = {stack.name: {id(module) for module in stack.layers.modules()} for stack in adapter.stacks(model)}
    for part in parts:
        names = [name for name in lora_targets(model, targets or ALL_LINEAR) if of_module.get(name) == part]
        if targets is None and part in stacks:
            names = [name for name in names if id(model.get_submodule(name)) in stacks[part]]
        if not names:
            raise ValueError(f"lora.parts names {part!r}, where no module is that LoRA could adapt: set lora.targets, or remove the part")
        found += names
    return [name for name, _ in model.named_modules() if name in found]


def full_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Exact names of the modules for names or name suffixes, and of modules that share their weights.

    Tied modules train as one. PEFT loads each into a copy of its own, so that its file must have all of them.

    Raises:
        ValueError: a name matches nothing, or a module that cannot train.
    """
    modules = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for requested in names:
        matching = [name for name in modules if _matches(name, (requested,)) and not any(_inside(name, other) for other in found)]
        if not matching:
            with_weights = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(
                f"lora.modules_to_save names {requested!r}, which the model does not have; at its top are {', '.join(with_weights)}"
            )
        found += matching
    found += [name for name in tied_to(model, found) if not any(_inside(name, other) for other in found)]
    whole = [name for name in found if any(not parameter.is_floating_point() for parameter in model.get_submodule(name).parameters())]
    if whole:
        raise ValueError(f"{', '.join(whole)} would train in full and is quantised: load the base with llm_int8_skip_modules={whole}")
    return found


def _tied(model: nn.Module, name: str) -> bool:
    """True if another module shares the weight of this one."""
    return bool(tied_to(model, [name]))


def tied_to(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of other modules that share a parameter with the named ones."""
    inside = tuple(modules)
    shared = {id(parameter) for name in inside for parameter in model.get_submodule(name).parameters()}
    owners = [key.rpartition(".")[0] for key, value in model.named_parameters(remove_duplicate=False) if id(value) in shared]
    return [owner for owner in owners if not any(_inside(owner, name) for name in inside)]


def lora_state(model: nn.Module, name: str = "default", state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """LoRA tensors by the names in PEFT's files.

    Args:
        model: model with LoRA.
        name: name of the adapter.
        state: the model's parameters by name, if the model itself is sharded; None takes them from the model.

    Returns:
        Tensors that share memory with the model, or with ``state``.
    """
    from peft import get_peft_model_state_dict

    peft: Any = get_peft_model_state_dict
    found = peft(model, state_dict=dict(model.state_dict() if state is None else state), adapter_name=name, save_embedding_layers=False)
    return {PEFT_PREFIX + key: value for key, value in found.items()}


def merge_lora(model: PreTrainedModel) -> PreTrainedModel:
    """Merges the active adapter into the weights and removes all LoRA, in place; routers are unchanged.

    Returns:
        The same object, as if it never had LoRA. Which parameters are trainable does not change.

    Raises:
        ValueError: there is no LoRA, the base is quantised, or a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA to merge")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the base is quantised, and merging would round what LoRA learned: load the adapter onto the base in full precision"
        )
    for name, module in found.items():
        layer: Any = module
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def _check_only(model: nn.Module, targets: Iterable[str]) -> None:
    """Raises RuntimeError if PEFT adapted other modules than requested."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    routers = [name for name, module in model.named_modules() if isinstance(module, Stage)]
    wrong = sorted(name for name in adapted if any(_inside(name, router) for router in routers)) + sorted(set(targets) - adapted)
    if wrong:
        raise RuntimeError(f"PEFT put LoRA elsewhere than requested: {', '.join(wrong[:5])}")


def _matches(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _nothing(requested: list[str], known: Mapping[str, Any], free: Mapping[str, Any]) -> list[str]:
    """Raises ValueError with the reason why the targets match nothing."""
    there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in free}))
    in_routers = [target for target in requested if any(_matches(name, (target,)) for name in known)]
    why = "are parts of routers, which train in full" if in_routers else "match nothing that LoRA can adapt"
    raise ValueError(
        f"lora.targets = {in_routers or requested}: they {why}; give names or ends of names, of {there}, or {ALL_LINEAR}, or null"
    )
