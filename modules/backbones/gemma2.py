"""Gemma 2 of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import DecoderBackbone


class Gemma2Backbone(DecoderBackbone):
    """A norm before and one after each half, and every other layer looks through a sliding window."""

    model_type = "gemma2"
    classes: ClassVar[tuple[str, ...]] = ("Gemma2Model", "Gemma2ForCausalLM")

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
