"""Adapters for Llama and families with the same layers: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tokens.gather import take
from ..tokens.state import TokenState
from .decoder import Decoder, DecoderLayers


class LlamaLayers(DecoderLayers):
    """Pre-norm layers with rotary positions, grouped keys and a gated MLP."""

    no_query = None

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

    @classmethod
    def query_and_keys(
        cls, layer: nn.Module, hidden_states: Tensor, slot: Tensor, state: TokenState, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, float]:
        parts: Any = layer
        attention, normed = parts.self_attn, parts.input_layernorm(hidden_states)
        turns = cls.gather_inputs(inputs, state.position)["position_embeddings"]
        queries, keys = attention.q_proj(take(normed, slot)), attention.k_proj(normed)
        # Qwen3 has a norm on queries and keys.
        query, key = (
            getattr(attention, norm, _unchanged)(part.view(*part.shape[:2], -1, attention.head_dim)).transpose(1, 2)
            for part, norm in ((queries, "q_norm"), (keys, "k_norm"))
        )
        return rotated(query, *(take(turn, slot) for turn in turns)), rotated(key, *turns), attention.scaling


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, M, D) queries or keys with rotary positions (arXiv 2104.09864), of which (B, M, D) are the cosines and sines."""
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _unchanged(heads: Tensor) -> Tensor:
    return heads


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
