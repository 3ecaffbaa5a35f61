"""Mistral of transformers."""

from __future__ import annotations

from typing import ClassVar

from .llama import LlamaBackbone


class MistralBackbone(LlamaBackbone):
    """Layers as Llama has them, all of which may look through a sliding window."""

    model_type = "mistral"
    classes: ClassVar[tuple[str, ...]] = ("MistralModel", "MistralForCausalLM")
