"""ViT of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..counting import BackboneShape
from ..scorers.base import TokenSpec
from ..sites import SITES
from ..state import Trace
from .base import Backbone


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class ViTBackbone(Backbone):
    """One CLS token in front, learned positions added before the layers, one attention mask for all of them."""

    model_type = "vit"
    sites = SITES
    packs = True
    classes: ClassVar[tuple[str, ...]] = ("ViTModel", "ViTForImageClassification")

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        layers = cls.base(model).layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @classmethod
    def prefix(cls, config: PretrainedConfig) -> int:
        return 1

    @classmethod
    def token_spec(cls, config: PretrainedConfig) -> TokenSpec:
        down, across = _pair(config.patch_size)
        return TokenSpec(config.hidden_size, config.num_labels or 0, patch_values=down * across * config.num_channels)

    @classmethod
    def shape(cls, model: PreTrainedModel) -> BackboneShape:
        config = model.config
        (height, width), (down, across) = _pair(config.image_size), _pair(config.patch_size)
        patches = (height // down) * (width // across)
        layers = {id(module) for module in cls.layers(model).modules()}
        outside = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in layers]
        return BackboneShape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            prefix=cls.prefix(config),
            patches=patches,
            embed_macs=patches * config.hidden_size * config.num_channels * down * across,
            # Heads and pooler of these models read one token each.
            head_macs=sum(module.in_features * module.out_features for module in outside),
        )

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        pixel_values = inputs.get("pixel_values")
        if isinstance(pixel_values, Tensor):
            down, across = _pair(model.config.patch_size)
            trace.pixel_values = pixel_values
            trace.grid = (pixel_values.shape[-2] // down, pixel_values.shape[-1] // across)

    @classmethod
    def cls_query_and_keys(cls, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        attention: Any = layer.attention
        normed = layer.layernorm_before(hidden_states)  # type: ignore[operator]
        rows, tokens, _ = normed.shape
        query = attention.q_proj(normed[:, :1]).view(rows, 1, -1, attention.head_dim).transpose(1, 2)
        keys = attention.k_proj(normed).view(rows, tokens, -1, attention.head_dim).transpose(1, 2)
        return query, keys, attention.scaling

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.attention(parts.layernorm_before(hidden_states), attention_mask, **kwargs)
        out: Tensor = parts.dropout(attended) + hidden_states
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = parts.dropout(parts.mlp(parts.layernorm_after(hidden_states))) + hidden_states
        return out

    @classmethod
    def keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        normed = parts.layernorm_before(hidden_states)
        keys: Tensor = parts.attention.k_proj(normed).view(*normed.shape[:2], -1, parts.attention.head_dim).transpose(1, 2)
        return keys
