"""Llama of transformers, and what is built like it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import DecoderBackbone


class LlamaBackbone(DecoderBackbone):
    """Pre-norm layers with rotary positions, grouped keys and a gated MLP."""

    model_type = "llama"
    classes: ClassVar[tuple[str, ...]] = ("LlamaModel", "LlamaForCausalLM")

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.self_attn(hidden_states=parts.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs)
        out: Tensor = hidden_states + attended
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = hidden_states + parts.mlp(parts.post_attention_layernorm(hidden_states))
        return out
