"""Gemma 3 of transformers, its language model."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedModel

from .gemma2 import Gemma2Backbone


class Gemma3TextBackbone(Gemma2Backbone):
    """Layers as Gemma 2 has them; sliding and full ones have rotary positions of their own, and a model one mask for each kind."""

    model_type = "gemma3_text"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3TextModel", "Gemma3ForCausalLM")

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        if model.config.use_bidirectional_attention:
            raise ValueError("this Gemma 3 attends in both directions (use_bidirectional_attention): only causal ones are served")
