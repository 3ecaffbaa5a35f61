"""Adapters for GPT-2."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .decoder import Decoder, DecoderLayers


class Gpt2Layers(DecoderLayers):
    """Pre-norm layers without positions."""

    positional = ("past_key_values", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        own = {name: value for name, value in kwargs.items() if not name.startswith("encoder_")}
        attended, _ = parts.attn(parts.ln_1(hidden_states), attention_mask=attention_mask, **own)
        out: Tensor = attended + hidden_states
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = hidden_states + parts.mlp(parts.ln_2(hidden_states))
        return out


class Gpt2(Decoder):
    """GPT-2 models. Learned positions are added before the layers, so a token keeps its position in any sequence."""

    model_type = "gpt2"
    layer_adapter = Gpt2Layers
    layers_at = "h"
    classes: ClassVar[tuple[str, ...]] = ("GPT2Model", "GPT2LMHeadModel")

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        if model.config.add_cross_attention:
            raise ValueError("this GPT-2 has cross-attention (add_cross_attention): only models without it are supported")

    @classmethod
    def gated(cls, config: PretrainedConfig) -> bool:
        return False

    @classmethod
    def intermediate(cls, config: Any) -> int:
        return int(config.n_inner or 4 * config.hidden_size)
