"""Adapters for Llama and families with the same layers: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .decoder import Decoder, DecoderLayers


class LlamaLayers(DecoderLayers):
    """Pre-norm layers with rotary positions, grouped keys and a gated MLP."""

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


class Llama(Decoder):
    """Llama models. Every layer attends to all earlier tokens."""

    model_type = "llama"
    layer_adapter = LlamaLayers
    classes: ClassVar[tuple[str, ...]] = ("LlamaModel", "LlamaForCausalLM")


class Mistral(Llama):
    """Mistral models. All layers may use a sliding window."""

    model_type = "mistral"
    classes: ClassVar[tuple[str, ...]] = ("MistralModel", "MistralForCausalLM")


class Qwen2(Llama):
    """Qwen2 models, with biases on queries, keys and values; some layers may use a sliding window."""

    model_type = "qwen2"
    classes: ClassVar[tuple[str, ...]] = ("Qwen2Model", "Qwen2ForCausalLM")


class Qwen3(Llama):
    """Qwen3 models, with a norm on queries and keys; some layers may use a sliding window."""

    model_type = "qwen3"
    classes: ClassVar[tuple[str, ...]] = ("Qwen3Model", "Qwen3ForCausalLM")
