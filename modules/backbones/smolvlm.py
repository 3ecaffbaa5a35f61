"""Adapters for SmolVLM and Idefics3: images in tiles, and a connector that joins squares of patches (pixel shuffle)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from .multimodal import Multimodal, linear_macs, tower_macs


class SmolVLM(Multimodal):
    """SmolVLM models. Text tokens around each tile tell where it was; they are protected as all text."""

    model_type = "smolvlm"
    layers_at = "text_model.layers"
    blocks_at = "vision_model.encoder.layers"
    parts_at: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model",), "projector": ("connector",)}
    classes: ClassVar[tuple[str, ...]] = ("SmolVLMModel", "SmolVLMForConditionalGeneration")

    @classmethod
    def image_cost(cls, base: nn.Module, config: Any, size: tuple[int, int] | None) -> tuple[int, float]:
        vision = config.vision_config
        height, width = size or (vision.image_size, vision.image_size)
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        visual = patches // config.scale_factor**2
        tower = tower_macs(base.get_submodule("vision_model"), base.get_submodule(cls.blocks_at), patches, vision.hidden_size)
        return visual, tower + visual * linear_macs(base.get_submodule("connector"))


class Idefics3(SmolVLM):
    """Idefics3 models."""

    model_type = "idefics3"
    classes: ClassVar[tuple[str, ...]] = ("Idefics3Model", "Idefics3ForConditionalGeneration")
