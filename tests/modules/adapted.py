"""Models with LoRA and routers for the tests of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from laconic import add_lora, compress, save_adapter
from tests.matrix import METHODS, Method, dense

LEARNED = METHODS[0]


def base_folder(folder: Path, family: str = "vit", **settings: Any) -> Path:
    """A dense model with random weights, saved."""
    dense(family, **settings).save_pretrained(folder)
    return folder


def adapted(base: Path, seed: int = 1, method: Method | None = LEARNED, layers: tuple[int, ...] = (1, 2), **lora: Any) -> PreTrainedModel:
    """A model on a saved base, whose LoRA, routers and head are far from what they start as."""
    from transformers import AutoModelForImageClassification

    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(base)
    if method is not None:
        compress(model, method.config(0.5, 0.6, layers=layers))
    add_lora(model, LoraConfig(**{"r": 2, "modules_to_save": ["classifier"], **lora}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def adapter_folder(folder: Path, base: Path, **settings: Any) -> tuple[Path, PreTrainedModel]:
    """An adapter folder and the model that it was written from."""
    model = adapted(base, **settings)
    save_adapter(model, folder, base)
    return folder, model
