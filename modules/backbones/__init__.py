"""Adapters of model families: where their layers, masks, protected tokens and positions are. One small file per family."""

from __future__ import annotations

import functools
import importlib

from transformers import PreTrainedModel

from .. import registry
from .model_adapter import ModelAdapter


@functools.cache
def families() -> dict[str, type[ModelAdapter]]:
    """Every model adapter by its ``model_type``, found by importing all files of this folder."""
    found: dict[str, type[ModelAdapter]] = {}
    for module in registry.files(__name__).values():
        for item in vars(importlib.import_module(module)).values():
            if isinstance(item, type) and issubclass(item, ModelAdapter) and hasattr(item, "model_type"):
                found[item.model_type] = item
    return found


def adapter_for(model_type: str, class_name: str) -> type[ModelAdapter]:
    """The adapter for a model class.

    Raises:
        ValueError: no adapter supports the family, or the family's adapter does not support this class.
    """
    known = families()
    if model_type not in known:
        raise ValueError(f"no backbone adapter for model_type {model_type!r} ({class_name}): there are {', '.join(sorted(known))}")
    adapter = known[model_type]
    if class_name in adapter.refused:
        raise ValueError(f"{class_name} cannot be compressed: {adapter.refused[class_name]}")
    if class_name not in adapter.classes:
        raise ValueError(f"the {model_type!r} adapter does not serve {class_name}: it serves {', '.join(adapter.classes)}")
    return adapter


def adapter_of(model: PreTrainedModel) -> type[ModelAdapter]:
    """The adapter of a compressed or dense model. Raises ValueError as ``adapter_for`` does."""
    cls = getattr(type(model), "original", type(model))
    return adapter_for(model.config.model_type, cls.__name__)
