"""Adapters for BERT."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .head_means import mean_over_heads
from .text_encoder import TextEncoder, TextEncoderLayers


class BertLayers(TextEncoderLayers):
    """Post-norm layers: each half ends with its norm."""

    positional = ("attention_mask", "encoder_hidden_states")

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        own = {name: value for name, value in kwargs.items() if not name.startswith("encoder_")}
        attended: Tensor = parts.attention(hidden_states, attention_mask, **own)[0]
        return attended

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = parts.feed_forward_chunk(hidden_states)
        return out

    @classmethod
    def keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        return _heads(parts.attention.self, parts.attention.self.key(hidden_states))

    @classmethod
    def mean_keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        attention: Any = layer.attention.self  # type: ignore[union-attr]
        return mean_over_heads(attention.key, hidden_states, attention.attention_head_size)

    @classmethod
    def cls_query_and_keys(cls, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        attention: Any = layer.attention.self  # type: ignore[union-attr]
        query = _heads(attention, attention.query(hidden_states[:, :1]))
        return query, cls.keys(layer, hidden_states), attention.scaling


class Bert(TextEncoder):
    """BERT models. Learned positions and segments are added before the layers; the pooler reads [CLS]."""

    model_type = "bert"
    layer_adapter = BertLayers
    layers_at = "encoder.layer"
    classes: ClassVar[tuple[str, ...]] = ("BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForTokenClassification")
    refused: ClassVar[dict[str, str]] = {"BertLMHeadModel": "it is a decoder; take a model made for generation, such as GPT-2 or Llama"}
    dense_heads = ("BertForMaskedLM", "BertForTokenClassification")

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        config = model.config
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("this BERT is a decoder (is_decoder, add_cross_attention): only encoders are supported")
        if config.chunk_size_feed_forward:
            raise ValueError(
                f"chunk_size_feed_forward = {config.chunk_size_feed_forward} needs row lengths that it divides, and stages leave any "
                "length: set it to 0"
            )

    @classmethod
    def gated(cls, config: PretrainedConfig) -> bool:
        return False


def _heads(attention: Any, projected: Tensor) -> Tensor:
    """(B, M, H·D) -> (B, H, M, D)."""
    return projected.view(*projected.shape[:2], -1, attention.attention_head_size).transpose(1, 2)
