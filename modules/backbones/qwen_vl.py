"""Adapters for Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, with positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import CompressionConfig
from .decoder import Decoder
from .llama import LlamaLayers
from .multimodal import Multimodal, check_no_early_drop, linear_macs, tower_macs
from .tiles import Tile

# Height and width of the cost model's default image, in pixels.
_IMAGE = (448, 448)
# Visual tokens along one side of the smallest image.
_SIDE = 4


class _Text(Decoder):
    """The language models of these families. transformers builds them only inside the whole model."""

    layer_adapter = LlamaLayers


class QwenVL(Multimodal):
    """What these families have in common: a tower that runs all images as one row, and a merger of squares of patches."""

    blocks_at = "visual.blocks"
    parts_at: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("visual",),
        "projector": ("visual.merger", "visual.deepstack_merger_list"),
    }
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    types_at = "mm_token_type_ids"

    @classmethod
    def plain_images(cls, config: Any, number: int) -> dict[str, Tensor]:
        vision = config.vision_config
        side = _SIDE * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(number * side**2, values), "image_grid_thw": torch.tensor([[1, side, side]] * number)}

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        found, vision, start = list[Tile](), config.vision_config, 0
        merged, patch = vision.spatial_merge_size, vision.patch_size
        for time, height, width in inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else []:
            patches = inputs["pixel_values"][start : start + time * height * width]
            start += len(patches)
            rows, columns = height // merged, width // merged
            # Patches of a token follow each other; a still image is there twice in time.
            of_time = patches.view(time, rows, columns, merged, merged, vision.in_channels, -1, patch, patch)[0, ..., 0, :, :]
            pixels = of_time.permute(4, 0, 2, 5, 1, 3, 6).reshape(vision.in_channels, height * patch, width * patch)
            found.append(Tile(pixels, rows, columns))
        return found

    @classmethod
    def image_cost(cls, base: nn.Module, config: Any, size: tuple[int, int] | None) -> tuple[int, float]:
        vision, (height, width) = config.vision_config, size or _IMAGE
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        visual = patches // vision.spatial_merge_size**2
        tower, blocks = base.get_submodule("visual"), base.get_submodule(cls.blocks_at)
        # Behind the layers, mergers join squares of patches into tokens.
        mergers = linear_macs(tower) - linear_macs(blocks)
        return visual, tower_macs(tower, blocks, patches, cls.width(vision), cls.share(vision, patches)) + visual * mergers

    @classmethod
    def width(cls, vision: Any) -> int:
        """Width of the tower's queries."""
        return int(vision.hidden_size)

    @classmethod
    def share(cls, vision: Any, patches: int) -> float:
        """Mean over the tower's layers of the part of the square of attention that is computed."""
        return 1.0


class Qwen2VL(QwenVL):
    """Qwen2-VL models."""

    model_type = "qwen2_vl"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {"qwen2_vl_text": _Text}
    classes: ClassVar[tuple[str, ...]] = ("Qwen2VLModel", "Qwen2VLForConditionalGeneration")

    @classmethod
    def width(cls, vision: Any) -> int:
        return int(vision.embed_dim)


class Qwen25VL(QwenVL):
    """Qwen2.5-VL models. Most layers of the tower attend inside windows."""

    model_type = "qwen2_5_vl"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {"qwen2_5_vl_text": _Text}
    classes: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration")

    @classmethod
    def share(cls, vision: Any, patches: int) -> float:
        window, full = min(1.0, (vision.window_size // vision.patch_size) ** 2 / patches), len(vision.fullatt_block_indexes)
        return float((full + (vision.depth - full) * window) / vision.depth)


class Qwen3VL(QwenVL):
    """Qwen3-VL models. The first layers of the language model are given features of the tower again, at all visual tokens (DeepStack)."""

    model_type = "qwen3_vl"
    languages: ClassVar[Mapping[str, type[Decoder]]] = {"qwen3_vl_text": _Text}
    classes: ClassVar[tuple[str, ...]] = ("Qwen3VLModel", "Qwen3VLForConditionalGeneration")

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        first = cls.whole_until(model)
        check_no_early_drop(
            config, first, f"DeepStack adds features of the tower to all visual tokens behind each of the first {first} layers"
        )

    @classmethod
    def whole_until(cls, model: PreTrainedModel) -> int:
        vision: Any = model.config.vision_config
        return len(vision.deepstack_visual_indexes)
