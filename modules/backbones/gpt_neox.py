"""Adapters for GPT-NeoX (Pythia)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from ..config import BYPASS
from .decoder import Decoder, DecoderLayers


class GptNeoxLayers(DecoderLayers):
    """Layers that mostly have a parallel residual: attention and MLP read the same input, so there is no site between them."""

    cache_name = "layer_past"

    @classmethod
    def refused_sites(cls, config: Any) -> Mapping[str, str]:
        if not config.use_parallel_residual:
            return {}
        why = "the layers of this gpt_neox compute attention and MLP in parallel (use_parallel_residual); take 'around'"
        return {site: why for site in BYPASS if site != "around"}

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.attention(parts.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs)
        out: Tensor = parts.post_attention_dropout(attended) + hidden_states
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        made = parts.post_mlp_dropout(parts.mlp(parts.post_attention_layernorm(hidden_states)))
        out: Tensor = made + hidden_states
        return out


class GptNeox(Decoder):
    """GPT-NeoX models. The MLP has two matrices and no gate."""

    model_type = "gpt_neox"
    layer_adapter = GptNeoxLayers
    classes: ClassVar[tuple[str, ...]] = ("GPTNeoXModel", "GPTNeoXForCausalLM")

    @classmethod
    def gated(cls, config: PretrainedConfig) -> bool:
        return False
