"""Adapters for DeiT: ViT with a distillation token after CLS."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig

from .vit import ViT, ViTLayers


class DeiTLayers(ViTLayers):
    """ViT layers with two protected tokens at the start."""

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 2


class DeiT(ViT):
    """DeiT models: ViTs with a distillation token."""

    model_type = "deit"
    layer_adapter = DeiTLayers
    classes: ClassVar[tuple[str, ...]] = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
