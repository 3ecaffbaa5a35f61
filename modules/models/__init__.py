"""Models that transformers does not have: heads for dense answers, one family a file."""

from __future__ import annotations

import importlib
import pkgutil

from transformers import PreTrainedModel


def own_models() -> dict[str, type[PreTrainedModel]]:
    """Every model class of this folder by its name; the folder is the registry."""
    found: dict[str, type[PreTrainedModel]] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for name, item in vars(loaded).items():
            if isinstance(item, type) and issubclass(item, PreTrainedModel) and item.__module__ == loaded.__name__:
                found[name] = item
    return found
