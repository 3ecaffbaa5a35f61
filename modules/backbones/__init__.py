"""Adapters: where layers, masks, protected tokens and positions are, one small class a family."""

from __future__ import annotations

import importlib

from .. import registry
from .base import Backbone


def backbones() -> dict[str, type[Backbone]]:
    """Every adapter by the ``model_type`` it serves; the folder is the registry."""
    found: dict[str, type[Backbone]] = {}
    for module in registry.files(__name__).values():
        for item in vars(importlib.import_module(module)).values():
            if isinstance(item, type) and issubclass(item, Backbone) and hasattr(item, "model_type"):
                found[item.model_type] = item
    return found


def backbone_for(model_type: str, class_name: str) -> type[Backbone]:
    """The adapter for a model.

    Raises:
        ValueError: no adapter serves the family, or the adapter does not serve this class of it.
    """
    known = backbones()
    if model_type not in known:
        raise ValueError(f"no backbone adapter for model_type {model_type!r} ({class_name}): there are {', '.join(sorted(known))}")
    backbone = known[model_type]
    if class_name in backbone.refused:
        raise ValueError(f"{class_name} cannot be compressed: {backbone.refused[class_name]}")
    if class_name not in backbone.classes:
        raise ValueError(f"the {model_type!r} adapter does not serve {class_name}: it serves {', '.join(backbone.classes)}")
    return backbone
