"""Adapter for InternVL: images in tiles of one size, and squares of patches joined before the projector (pixel shuffle)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tokens.state import TokenState
from .before_text import OTHERS
from .grid_tower import GridTower
from .tiles import Tile
from .vision import VisionLayers, pair

_NO_MASK = "layers of an InternVL's tower take no mask"


class InternVLVisionLayers(VisionLayers):
    """Pre-norm layers with a factor on each half, and a CLS token at the start. They take no mask."""

    no_key_bias = _NO_MASK
    no_padding = _NO_MASK

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        out: Tensor = parts.lambda_1 * parts.attention(parts.layernorm_before(hidden_states))[0] + hidden_states
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out = parts.dropout(parts.mlp(parts.layernorm_after(hidden_states)))
        out = out if parts.lambda_2 is None else parts.lambda_2 * out
        summed: Tensor = out + hidden_states
        return summed

    @classmethod
    def _keys(cls, layer: nn.Module, normed: Tensor) -> Tensor:
        attention: Any = layer.attention
        keys: Tensor = attention.k_norm(attention.k_proj(normed))
        return keys.view(*keys.shape[:2], -1, attention.head_dim).transpose(1, 2)

    @classmethod
    def cls_query_and_keys(cls, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        parts: Any = layer
        normed, attention = parts.layernorm_before(hidden_states), parts.attention
        query = attention.q_norm(attention.q_proj(normed[:, :1])).view(len(normed), 1, -1, attention.head_dim).transpose(1, 2)
        return query, cls._keys(layer, normed), attention.scale


class InternVL(GridTower):
    """InternVL models. Each tile of an image is a row of the tower."""

    model_type = "internvl"
    blocks_at = "vision_tower.encoder.layer"
    vision_layers = InternVLVisionLayers
    classes: ClassVar[tuple[str, ...]] = ("InternVLModel", "InternVLForConditionalGeneration")

    @classmethod
    def not_before_text(cls, model: PreTrainedModel) -> str | None:
        config: Any = model.config
        for key, known in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default")):
            if getattr(config, key) != known:
                return f"{key} = {getattr(config, key)!r} is not known to Laconic in an InternVL: set {known!r}, or {OTHERS}"
        return None

    @classmethod
    def side(cls, config: Any) -> int:
        return int(1 / config.downsample_ratio)

    @classmethod
    def behind(cls, tower: Any) -> Any:
        return tower.layernorm

    @classmethod
    def encoded(cls, features: Sequence[Tensor], deep: Sequence[Sequence[Tensor]] | None = None) -> Any:
        output = super().encoded(features, deep)
        output.pooler_output = torch.stack(list(features))
        return output

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        down, across = pair(config.vision_config.patch_size)
        share = config.downsample_ratio
        return [
            Tile(pixels, round(pixels.shape[-2] // down * share), round(pixels.shape[-1] // across * share))
            for pixels in inputs.get("pixel_values", ())
        ]
