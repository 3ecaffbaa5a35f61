"""Adapter for InternVL: images in tiles of one size, and squares of patches joined before the projector (pixel shuffle)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .multimodal import Multimodal, linear_macs, tower_macs
from .vision import pair


class InternVL(Multimodal):
    """InternVL models."""

    model_type = "internvl"
    blocks_at = "vision_tower.encoder.layer"
    classes: ClassVar[tuple[str, ...]] = ("InternVLModel", "InternVLForConditionalGeneration")

    @classmethod
    def image_cost(cls, base: nn.Module, config: Any, size: tuple[int, int] | None) -> tuple[int, float]:
        vision = config.vision_config
        (height, width), (down, across) = size or pair(vision.image_size), pair(vision.patch_size)
        patches = (height // down) * (width // across)
        visual = round(patches * config.downsample_ratio**2)
        # One class token beside the patches.
        tower = tower_macs(base.get_submodule("vision_tower"), base.get_submodule(cls.blocks_at), patches + 1, vision.hidden_size)
        return visual, tower + visual * linear_macs(base.get_submodule("multi_modal_projector"))
