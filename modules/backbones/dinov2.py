"""Adapters for DINOv2."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .vision import VisionLayers, VisionModel


class Dinov2Layers(VisionLayers):
    """ViT layers with layer scale and, in the largest model, a gated MLP."""

    norm = "norm1"

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.attention(parts.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        out: Tensor = parts.drop_path(parts.layer_scale1(attended)) + hidden_states
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = parts.drop_path(parts.layer_scale2(parts.mlp(parts.norm2(hidden_states)))) + hidden_states
        return out


class Dinov2(VisionModel):
    """DINOv2 models, with one CLS token at the start. The classifier reads CLS and the mean of the patches."""

    model_type = "dinov2"
    layer_adapter = Dinov2Layers
    layers_at = "encoder.layer"
    classes: ClassVar[tuple[str, ...]] = ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2ForSemanticSegmentation")
    averages = True

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        if "attention_mask" not in inspect.signature(cls.layers(model)[0].forward).parameters:
            raise ValueError(
                f"transformers {transformers.__version__} passes the layers of {cls.model_type} neither a mask nor other arguments, "
                "which compression needs: install transformers 5.23"
            )

    @classmethod
    def intermediate(cls, config: Any) -> int:
        width = int(config.hidden_size * config.mlp_ratio)
        if not config.use_swiglu_ffn:
            return width
        # A gated MLP has three matrices of two thirds the width, rounded up to a multiple of 8; returned is the equivalent of two.
        return (int(width * 2 / 3) + 7) // 8 * 8 * 3 // 2
