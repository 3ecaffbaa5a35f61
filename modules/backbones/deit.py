"""DeiT of transformers: ViT with a distillation token after CLS."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig

from .vit import ViT, ViTLayers


class DeiTLayers(ViTLayers):
    """Two protected tokens in front; otherwise those of a ViT."""

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 2


class DeiT(ViT):
    """A ViT with a distillation token."""

    model_type = "deit"
    layer_adapter = DeiTLayers
    classes: ClassVar[tuple[str, ...]] = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
