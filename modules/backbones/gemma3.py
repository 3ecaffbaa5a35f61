"""Adapter for Gemma 3 with images: the tokens of an image attend to each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from .decoder import Decoder
from .gemma import Gemma3Text
from .multimodal import Multimodal, tower_macs


class Gemma3(Multimodal):
    """Gemma 3 models with images. A layer's mask, causal but for the tokens of an image, is gathered on both of its axes."""

    model_type = "gemma3"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {Gemma3Text.model_type: Gemma3Text}
    blocks_at = "vision_tower.encoder.layers"
    classes: ClassVar[tuple[str, ...]] = ("Gemma3Model", "Gemma3ForConditionalGeneration")

    @classmethod
    def image_cost(cls, base: nn.Module, config: Any, size: tuple[int, int] | None) -> tuple[int, float]:
        vision = config.vision_config
        patches, visual = (vision.image_size // vision.patch_size) ** 2, config.mm_tokens_per_image
        tower = tower_macs(base.get_submodule("vision_tower"), base.get_submodule(cls.blocks_at), patches, vision.hidden_size)
        return visual, tower + visual * vision.hidden_size * config.text_config.hidden_size
