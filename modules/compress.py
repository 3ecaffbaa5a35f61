"""compress(model, config), decompress(model) and without_skipped(model): the only functions that edit a model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from .backbones import adapter_of
from .compressed_model import CompressedModel, become, build_stages, compressed_class, install, uninstall
from .config import CompressionConfig
from .layer import base_class
from .stage import stages_of

Model = TypeVar("Model", bound=PreTrainedModel)


def compress(model: Model, config: CompressionConfig) -> Model:
    """Adds token routers and mergers to a model, in place.

    Args:
        model: a transformers model of a supported family.
        config: the stages; every ``keep`` must be set (``Budget.resolve`` computes the missing ones).

    Returns:
        The same object; its class is now a generated subclass of its original class.

    Raises:
        ValueError: the model is already compressed, has no adapter, or does not support the config. The model is unchanged in this case.
    """
    if isinstance(model, CompressedModel):
        raise ValueError(f"{type(model).__name__} is compressed already: call decompress(model) first")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"compress needs a transformers model, not {type(model).__name__}")
    adapter = adapter_of(model)
    config = adapter.resolved(config, model.config)
    stages = build_stages(model, config, adapter)
    reference = next(model.parameters())
    for stage in stages:
        stage.to(device=reference.device, dtype=reference.dtype).train(model.training)
    install(model, config, stages, adapter)
    original: Any = type(model)
    become(model, compressed_class(original))
    model.config.compression = config.to_dict()
    return model


def decompress(model: Model) -> Model:
    """Removes the stages, in place: the model has its original class and its original parameters again.

    Raises:
        ValueError: the model is not compressed.
    """
    if not isinstance(model, CompressedModel):
        raise ValueError(f"{type(model).__name__} is not compressed")
    uninstall(model, model.adapter)
    model.__class__ = base_class(type(model))
    del model.config.compression
    return model


def skipped_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a compressed model that a stage leaves out for every token: their weights have no effect."""
    around = {id(stage) for stage in stages_of(model).values() if stage.skips and stage.config.site == "around"}
    # A stage is in the ModuleDict ``stages`` of its layer.
    return [name.rsplit(".", 2)[0] for name, module in model.named_modules() if id(module) in around]


def only_skips(model: PreTrainedModel) -> bool:
    """True if all that the stages of a model do is to leave whole layers out, in a model whose only stack these layers are."""
    skipped = skipped_layers(model)
    if any(stage.shortcut is not None for stage in stages_of(model).values()):
        return False
    return bool(skipped) and len(skipped) == len(stages_of(model)) and len(adapter_of(model).stacks(model)) == 1


def without_skipped(model: PreTrainedModel) -> PreTrainedModel:
    """The ordinary, shallower model that gives the same answers, in place: its stages and the layers that they leave out are removed.

    Args:
        model: a compressed model for which ``only_skips`` holds.
    """
    removed = {int(stage.config.layer) for stage in stages_of(model).values()}
    model = decompress(model)
    layers = adapter_of(model).layers(model)
    for index in sorted(removed, reverse=True):
        del layers[index]
    config: Any = model.config
    if (kinds := getattr(config, "layer_types", None)) is not None:
        config.layer_types = [kind for index, kind in enumerate(kinds) if index not in removed]
    config.num_hidden_layers = len(layers)
    for index, layer in enumerate(layers):
        # The place of the layer's keys and values in a cache.
        parts: Any = layer.modules()
        for module in parts:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns on transformers' gradient checkpointing, by the method name of the installed version."""
    # transformers 5.17 has only the older name, which later versions deprecate.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(model, "_require_grads_hook"):
        # For the reentrant kind alone: it makes the embeddings' outputs need a gradient, so that frozen layers would run backward.
        disable: Any = model.disable_input_require_grads
        disable()
