"""Laconic: transformers that are trained to run on fewer tokens.

``compress(model, CompressionConfig(...))`` puts token routers and mergers into a Hugging Face model; ``Trace`` tells what they
did; ``Budget`` holds the compression ratio. Imports are lazy, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .modules.budget.budget import Budget
    from .modules.budget.config import BudgetConfig
    from .modules.budget.start_routers import start_routers
    from .modules.checkpoints.adapter_saving import save_adapter
    from .modules.checkpoints.adapters import Adapters
    from .modules.checkpoints.keeps import set_keep
    from .modules.checkpoints.lora import add_lora, merge_lora, train_only
    from .modules.compress import compress, decompress
    from .modules.config import CompressionConfig, StageConfig
    from .modules.decoding.cache import RoutedCache
    from .modules.stage import stages_of
    from .modules.tokens.pooling import pooled
    from .modules.tokens.trace import Trace
    from .trainer.hf import BudgetMixin, BudgetTrainer
    from .trainer.run_folder import from_pretrained

_HOMES = {
    "Adapters": "modules.checkpoints.adapters",
    "Budget": "modules.budget.budget",
    "BudgetConfig": "modules.budget.config",
    "BudgetMixin": "trainer.hf",
    "BudgetTrainer": "trainer.hf",
    "CompressionConfig": "modules.config",
    "RoutedCache": "modules.decoding.cache",
    "StageConfig": "modules.config",
    "Trace": "modules.tokens.trace",
    "add_lora": "modules.checkpoints.lora",
    "compress": "modules.compress",
    "decompress": "modules.compress",
    "from_pretrained": "trainer.run_folder",
    "merge_lora": "modules.checkpoints.lora",
    "pooled": "modules.tokens.pooling",
    "set_keep": "modules.checkpoints.keeps",
    "save_adapter": "modules.checkpoints.adapter_saving",
    "stages_of": "modules.stage",
    "start_routers": "modules.budget.start_routers",
    "train_only": "modules.checkpoints.lora",
}
__all__ = [
    "Adapters",
    "Budget",
    "BudgetConfig",
    "BudgetMixin",
    "BudgetTrainer",
    "CompressionConfig",
    "RoutedCache",
    "StageConfig",
    "Trace",
    "__version__",
    "add_lora",
    "compress",
    "decompress",
    "from_pretrained",
    "merge_lora",
    "pooled",
    "save_adapter",
    "set_keep",
    "stages_of",
    "start_routers",
    "train_only",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'laconic' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
