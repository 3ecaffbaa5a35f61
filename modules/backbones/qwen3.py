"""Qwen3 of transformers."""

from __future__ import annotations

from typing import ClassVar

from .llama import LlamaBackbone


class Qwen3Backbone(LlamaBackbone):
    """Layers as Llama has them, with a norm on queries and keys; some may look through a sliding window."""

    model_type = "qwen3"
    classes: ClassVar[tuple[str, ...]] = ("Qwen3Model", "Qwen3ForCausalLM")
