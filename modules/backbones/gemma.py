"""Adapters for Gemma 2 and the language model of Gemma 3."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .decoder import Decoder, DecoderLayers


class GemmaLayers(DecoderLayers):
    """Layers with a norm before and after each half."""

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.self_attn(hidden_states=parts.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs)
        out: Tensor = hidden_states + parts.post_attention_layernorm(attended)
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        made = parts.mlp(parts.pre_feedforward_layernorm(hidden_states))
        out: Tensor = hidden_states + parts.post_feedforward_layernorm(made)
        return out


class Gemma2(Decoder):
    """Gemma 2 models. Every second layer uses a sliding window."""

    model_type = "gemma2"
    layer_adapter = GemmaLayers
    classes: ClassVar[tuple[str, ...]] = ("Gemma2Model", "Gemma2ForCausalLM")


class Gemma3Text(Gemma2):
    """Gemma 3 language models. Sliding and full layers have separate rotary positions and separate masks."""

    model_type = "gemma3_text"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3TextModel", "Gemma3ForCausalLM")

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        if model.config.use_bidirectional_attention:
            raise ValueError("this Gemma 3 attends in both directions (use_bidirectional_attention): only causal ones are served")
