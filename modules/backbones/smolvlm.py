"""Adapters for SmolVLM and Idefics3: images in tiles, and a connector that joins squares of patches (pixel shuffle)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .before_text import OTHERS
from .grid_tower import GridTower
from .tiles import Tile


class SmolVLM(GridTower):
    """SmolVLM models. Text tokens around each tile tell where it was; they are protected as all text. Each tile is a row of the tower.

    Attributes:
        reads_blank: where all images are blank, the tower reads the first of them.
    """

    model_type = "smolvlm"
    layers_at = "text_model.layers"
    vision_at = "vision_model"
    blocks_at = "vision_model.encoder.layers"
    projector_at = "connector.modality_projection"
    parts_at: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_model",), "projector": ("connector",)}
    images_by_row = True
    reads_blank: ClassVar[bool] = True
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    classes: ClassVar[tuple[str, ...]] = ("SmolVLMModel", "SmolVLMForConditionalGeneration")

    @classmethod
    def side(cls, config: Any) -> int:
        return int(config.scale_factor)

    @classmethod
    def rows(cls, base: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
        given, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        images = given.flatten(0, 1)
        # transformers fills up the rows of a batch with blank images.
        real = (images != 0).flatten(1).any(1)
        if cls.reads_blank:
            real[0] |= ~real.any()
        if mask is not None and not bool(mask.flatten(0, 1)[real].all()):
            raise ValueError(
                "pixel_attention_mask hides a part of an image, whose patches stages before the language model would count: give the "
                f"processor do_image_splitting = True, which makes tiles of one size, or {OTHERS}"
            )
        return images[real], real.view(given.shape[:2]).sum(1).tolist()

    @classmethod
    def embed(cls, tower: Any, pixel_values: Tensor) -> Tensor:
        patch = tower.config.patch_size
        every = pixel_values.new_ones(len(pixel_values), *(side // patch for side in pixel_values.shape[-2:]), dtype=torch.bool)
        hidden: Tensor = tower.embeddings(pixel_values=pixel_values, patch_attention_mask=every)
        return hidden

    @classmethod
    def plain_images(cls, config: Any, number: int) -> dict[str, Tensor]:
        side = config.vision_config.image_size
        # A tile of zeros would be padding.
        pixels = torch.ones(number, 1, config.vision_config.num_channels, side, side)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(number, 1, side, side, dtype=torch.long)}

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        cell = config.vision_config.patch_size * config.scale_factor
        return [
            Tile(pixels, pixels.shape[-2] // cell, pixels.shape[-1] // cell)
            for row in inputs.get("pixel_values", ())
            for pixels in row
            # Rows with fewer tiles than another one are filled up with zeros.
            if bool(pixels.any())
        ]


class Idefics3(SmolVLM):
    """Idefics3 models."""

    model_type = "idefics3"
    reads_blank = False
    classes: ClassVar[tuple[str, ...]] = ("Idefics3Model", "Idefics3ForConditionalGeneration")
