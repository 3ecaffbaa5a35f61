"""Adapters for ViT."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .vision import VisionLayers, VisionModel


class ViTLayers(VisionLayers):
    """Pre-norm layers; the model passes all layers one attention mask."""

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


class ViT(VisionModel):
    """ViT models, with one CLS token at the start and learned positions added before the layers."""

    model_type = "vit"
    layer_adapter = ViTLayers
    classes: ClassVar[tuple[str, ...]] = ("ViTModel", "ViTForImageClassification", "ViTForSemanticSegmentation")
