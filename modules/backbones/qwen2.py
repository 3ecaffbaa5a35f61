"""Qwen2 of transformers."""

from __future__ import annotations

from typing import ClassVar

from .llama import LlamaBackbone


class Qwen2Backbone(LlamaBackbone):
    """Layers as Llama has them, with biases on queries, keys and values; some may look through a sliding window."""

    model_type = "qwen2"
    classes: ClassVar[tuple[str, ...]] = ("Qwen2Model", "Qwen2ForCausalLM")
