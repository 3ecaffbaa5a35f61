"""DeiT of transformers: ViT with a distillation token after CLS."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig

from .vit import ViTBackbone


class DeiTBackbone(ViTBackbone):
    """Two protected tokens in front; otherwise a ViT."""

    model_type = "deit"
    classes: ClassVar[tuple[str, ...]] = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")

    @classmethod
    def prefix(cls, config: PretrainedConfig) -> int:
        return 2
