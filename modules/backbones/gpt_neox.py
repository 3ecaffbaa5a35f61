"""GPT-NeoX of transformers (Pythia)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from .decoder import DecoderBackbone


class GptNeoxBackbone(DecoderBackbone):
    """Mostly with a parallel residual: attention and MLP read the same input, and there is nothing between them."""

    model_type = "gpt_neox"
    classes: ClassVar[tuple[str, ...]] = ("GPTNeoXModel", "GPTNeoXForCausalLM")
    cache_name = "layer_past"

    @classmethod
    def parallel(cls, config: PretrainedConfig) -> bool:
        return bool(config.use_parallel_residual)

    @classmethod
    def gated(cls, config: PretrainedConfig) -> bool:
        return False

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
