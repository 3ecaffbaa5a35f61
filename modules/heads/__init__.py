"""Model classes that transformers lacks: heads for dense prediction, one family per file."""

from __future__ import annotations

import importlib

from transformers import PreTrainedModel

from .. import registry


def own_models() -> dict[str, type[PreTrainedModel]]:
    """Every model class of this folder by name, found by importing all its files."""
    found: dict[str, type[PreTrainedModel]] = {}
    for module in registry.files(__name__).values():
        loaded = importlib.import_module(module)
        for name, item in vars(loaded).items():
            if isinstance(item, type) and issubclass(item, PreTrainedModel) and item.__module__ == loaded.__name__:
                found[name] = item
    return found
