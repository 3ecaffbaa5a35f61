"""Adapters for the vision tower of CLIP, alone and with a classifier."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .vision import VisionLayers, VisionModel


class ClipVisionLayers(VisionLayers):
    """Pre-norm layers, with one CLS token at the start."""

    norm = "layer_norm1"
    attention = "self_attn"

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.self_attn(hidden_states=parts.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        out: Tensor = hidden_states + attended
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = hidden_states + parts.mlp(parts.layer_norm2(hidden_states))
        return out


class ClipVision(VisionModel):
    """CLIP vision towers. A norm precedes the first layer. The tower's own head reads CLS; a classifier averages the patches."""

    model_type = "clip_vision_model"
    layer_adapter = ClipVisionLayers
    layers_at = "encoder.layers"
    classes: ClassVar[tuple[str, ...]] = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
    averages = True
    takes_attention_mask = False

    @classmethod
    def embed(cls, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """(B, N, C) input of a tower's first layer."""
        parts: Any = tower
        hidden: Tensor = parts.embeddings(pixel_values)
        # The misspelt name is transformers'.
        norm = getattr(parts, "pre_layrnorm", None)
        return hidden if norm is None else norm(hidden)

    @classmethod
    def base(cls, model: PreTrainedModel) -> nn.Module:
        # transformers changed the declared base_model_prefix of these classes between versions.
        return getattr(model, "vision_model", model)


class Clip(ClipVision):
    """A CLIP vision tower with a classifier."""

    model_type = "clip"
    classes: ClassVar[tuple[str, ...]] = ("CLIPForImageClassification",)
    refused: ClassVar[dict[str, str]] = {
        "CLIPModel": "it holds a text model beside the vision tower: compress model.vision_model, or load CLIPVisionModelWithProjection"
    }
