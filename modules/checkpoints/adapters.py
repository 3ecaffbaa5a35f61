"""Adapters on one base model: loading, switching, merging."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..compress import compress, decompress
from ..compressed_model import CompressedModel
from ..config import CompressionConfig
from .adapter_folder import Adapter, AdapterError, read_adapter
from .adapter_saving import stage_state
from .base_weights import weights_hash
from .foreign_config import check_size, settings_errors
from .lora import add_lora, full_modules, lora_state, merge_lora, train_only
from .model_class import class_named
from .tensors import check_same, copy_all, own_memory

_HUB = ("token", "cache_dir", "local_files_only")


class Adapters:
    """Several adapters on one base model; one of them is active.

    Args:
        folders: adapter folders, or Adapters that were read, by adapter name.
        base: folder or hub name of the base, if it is not where the manifests say; the weights must be the same.
        kwargs: arguments of the base's ``from_pretrained`` (``dtype``, ``attn_implementation``, ``quantization_config`` …).

    Attributes:
        model: the base model with the active adapter; the same object for all adapters.
        active: name of the active adapter.

    Raises:
        AdapterError: a folder is damaged, has another base, or does not fit the base. Nothing is loaded in this case.
    """

    def __init__(self, folders: Mapping[str, str | Path | Adapter], base: str | Path | None = None, **kwargs: Any) -> None:
        if not folders:
            raise ValueError("give at least one adapter folder")
        found = {name: folder if isinstance(folder, Adapter) else read_adapter(folder) for name, folder in folders.items()}
        where = {name: f"adapter {name!r}" if isinstance(folder, Adapter) else str(folder) for name, folder in folders.items()}
        on_meta = {name: meta_model(adapter, where[name]) for name, adapter in found.items()}
        first, *others = found.items()
        for name, adapter in others:
            _check_beside(adapter, first[1], where[name], where[first[0]])
        self.model = load_base(first[1], where[first[0]], base, **kwargs)
        self._adapters: dict[str, Adapter] = {}
        self._heads: dict[str, dict[str, nn.Module]] = {}
        self._own_heads: dict[str, nn.Module] = {}
        for name, adapter in found.items():
            self._put(name, adapter, on_meta[name])
        self.active = ""
        self.use(first[0])

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        return list(self._adapters)

    def add(self, name: str, folder: str | Path) -> None:
        """Adds an adapter; the active one stays active.

        Raises:
            AdapterError: the folder is damaged, has another base, or does not fit. Nothing changes in this case.
            ValueError: there is an adapter of this name.
        """
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r} already: {', '.join(self.names)}; give another name")
        adapter = read_adapter(folder)
        _check_beside(adapter, next(iter(self._adapters.values())), str(folder), self.names[0])
        self._put(name, adapter, meta_model(adapter, str(folder)))
        self.use(self.active)

    def use(self, name: str) -> PreTrainedModel:
        """Activates an adapter: its LoRA, its stages with their weights, its head and its labels.

        Returns:
            ``model``, in evaluation mode.

        Raises:
            ValueError: there is no such adapter.
        """
        if name not in self._adapters:
            raise ValueError(f"no adapter {name!r}: there are {', '.join(self.names)}")
        model: Any = self.model
        adapter = self._adapters[name]
        if isinstance(model, CompressedModel):
            decompress(model)
        for module, own in {**self._own_heads, **self._heads[name]}.items():
            model.set_submodule(module, own)
        # The new head may share its weight with the embedding.
        model.tie_weights()
        config = config_of(adapter)
        model.config.id2label, model.config.label2id = config.id2label, config.label2id
        if hasattr(model, "num_labels"):
            model.num_labels = config.num_labels
        if adapter.compression is not None:
            compress(model, CompressionConfig.from_dict(adapter.compression))
            copy_all(stage_state(model), adapter.stages, f"adapter {name!r}")
        _activate(model, name)
        train_only(model, adapter.full, lora=name)
        self.active = name
        model.eval()
        return self.model

    def merge(self) -> PreTrainedModel:
        """Merges the active adapter into the model's weights. Its routers stay; other adapters are removed. Do not use this object again.

        Returns:
            ``model``, for ``save_pretrained``.
        """
        if self._adapters[self.active].lora_config is not None:
            merge_lora(self.model)
        elif hasattr(self.model, "peft_config"):
            _drop_lora(self.model)
        self._adapters.clear()
        return self.model

    def _put(self, name: str, adapter: Adapter, on_meta: PreTrainedModel) -> None:
        """Adds an adapter's LoRA and heads to the model, after all checks."""
        model = self.model
        device, dtype = next(model.parameters()).device, _float_dtype(model)
        heads: dict[str, nn.Module] = {}
        for module in adapter.full:
            head = on_meta.get_submodule(module).to_empty(device=device).to(dtype)
            copy_all(dict(head.state_dict()), _under(adapter.full_tensors, module), f"adapter {name!r}")
            own = self._own_heads.setdefault(module, model.get_submodule(module))
            # Buffers that no file holds, such as the scale of an embedding, are of the base.
            unsaved = {key: value for key, value in head.named_buffers() if key not in head.state_dict()}
            copy_all(unsaved, {key: value for key, value in own.named_buffers() if key in unsaved}, f"adapter {name!r}")
            heads[module] = head
        if adapter.lora_config is not None:
            with quietly():
                add_lora(model, copy.deepcopy(adapter.lora_config), name)
            copy_all(lora_state(model, name), adapter.lora, f"adapter {name!r}")
        self._heads[name] = heads
        self._adapters[name] = adapter


def load_base(adapter: Adapter, where: str, base: str | Path | None = None, **kwargs: Any) -> PreTrainedModel:
    """The dense base model of an adapter, after comparing its weights with the manifest's hash. A head that the adapter replaces is newly
    initialised.

    Raises:
        AdapterError: the base cannot be found, or is another one.
    """
    name, revision = (adapter.base.name, adapter.base.revision) if base is None else (str(base), None)
    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    check_base(adapter, where, name, revision, **hub)
    cls: Any = class_named(adapter.model_class, where)
    with quietly(), settings_errors(f"base {name!r} cannot be loaded", AdapterError):
        loaded = cls.from_pretrained(
            name, revision=revision or "main", config=config_of(adapter), use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True, trust_remote_code=False, **kwargs,
        )  # fmt: skip
    model, report = loaded
    new = {str(item[0] if isinstance(item, tuple) else item) for key in ("missing_keys", "mismatched_keys") for item in report[key]}
    lost = sorted(key for key in new if not any(key.startswith(f"{module}.") for module in adapter.full))
    if lost:
        raise AdapterError(f"base {name!r} lacks weights that the adapter in {where} does not bring: {', '.join(lost[:5])}")
    own_memory(model)
    model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


def check_base(adapter: Adapter, where: str, name: str, revision: str | None, **hub: Any) -> None:
    """Raises AdapterError if the base cannot be found, or differs from the one that the adapter was trained on."""
    try:
        digest = weights_hash(name, revision, **hub)
    except ValueError as error:
        raise AdapterError(f"the base of the adapter in {where} cannot be had: {error}; give its place with base=…") from None
    if digest != adapter.base.weights_sha256:
        raise AdapterError(
            f"{name!r} is another base than the adapter in {where} was trained on, {adapter.base.name!r}: their weights differ (SHA-256 "
            f"{digest[:12]}… and {adapter.base.weights_sha256[:12]}…); give that one with base=…"
        )


def meta_model(adapter: Adapter, where: str, values: bool = True) -> PreTrainedModel:
    """The adapter's model on the ``meta`` device: errors of config, stages, LoRA and tensors are found before the real model is touched.

    Args:
        adapter: adapter to load.
        where: its location, for messages.
        values: compare the adapter's tensors with the model's; False if the adapter has no tensors.

    Raises:
        AdapterError: a config or tensor does not fit the model.
    """
    cls: Any = class_named(adapter.model_class, where)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls._from_config(config_of(adapter))
            if adapter.compression is not None:
                compress(model, CompressionConfig.from_dict(adapter.compression))
            full = full_modules(model, adapter.full)
            if adapter.lora_config is None:
                train_only(model, full)
            else:
                config = copy.deepcopy(adapter.lora_config)
                config.modules_to_save = full
                add_lora(model, config)
    except AdapterError:
        raise
    except Exception as error:
        # A wrong config raises errors of many types in torch, transformers and PEFT.
        raise AdapterError(f"{where} does not fit {adapter.model_class}: {' '.join(str(error).split())}") from None
    if not values:
        return model
    state = model.state_dict()
    expected = {"routers": (stage_state(model), adapter.stages)}
    if adapter.lora_config is not None:
        expected["LoRA"] = (lora_state(model), adapter.lora)
    expected["modules trained in full"] = ({key: state[key] for key in state if _in_any(key, adapter.full)}, adapter.full_tensors)
    for what, (expected_tensors, given) in expected.items():
        try:
            check_same(expected_tensors, given, f"{where}: {what}")
        except ValueError as error:
            raise AdapterError(str(error)) from None
    return model


def config_of(adapter: Adapter) -> PretrainedConfig:
    """The config of the adapter's dense model, without running code. Raises AdapterError."""
    data = {key: value for key, value in adapter.model_config.items() if key not in ("auto_map", "compression", "quantization_config")}
    model_type: Any = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise AdapterError(f"the adapter's model_type {model_type!r} is unknown to this version of transformers")
    cls: Any = CONFIG_MAPPING[model_type]
    try:
        config = cls.from_dict(data)
        check_size(config, "the adapter's model")
    except Exception as error:
        # transformers checks its configs with errors of many types.
        raise AdapterError(f"the config of the adapter's model cannot be used: {' '.join(str(error).split())[:500]}") from None
    assert isinstance(config, PretrainedConfig)
    return config


def _check_beside(adapter: Adapter, other: Adapter, where: str, where_other: str) -> None:
    if adapter.base.weights_sha256 != other.base.weights_sha256:
        raise AdapterError(
            f"{where} was trained on {adapter.base.name!r} and {where_other} on {other.base.name!r}, which have other weights: adapters must "
            "have the same base"
        )
    if adapter.model_class != other.model_class:
        raise AdapterError(f"{where} is for {adapter.model_class} and {where_other} for {other.model_class}: they do not go together")


def _activate(model: nn.Module, name: str) -> None:
    _each_lora(model, lambda layer: layer.set_adapter(name))


def _drop_lora(model: PreTrainedModel) -> None:
    for name in [name for name, module in model.named_modules() if hasattr(module, "get_base_layer")]:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _each_lora(model: nn.Module, act: Callable[[Any], Any]) -> None:
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                act(module)


def _under(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")}


def _in_any(key: str, modules: Iterable[str]) -> bool:
    return any(key.startswith(f"{module}.") for module in modules)


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences warnings of transformers and PEFT about new heads, further adapters and unused weights, which Laconic checks itself."""
    import warnings

    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
