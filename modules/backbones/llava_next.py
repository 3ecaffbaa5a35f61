"""Adapters for LLaVA-NeXT and LLaVA-OneVision: images in tiles, with a token at the end of each line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tokens.trace import Trace
from .llava import TOWERS
from .multimodal import Multimodal, linear_macs, tower_macs

# Tiles of the cost model's default image: the whole image and four parts of it.
_TILES = 5


class LlavaNext(Multimodal):
    """LLaVA-NeXT models. The learned token at the end of a line of patches is protected: it tells the lines apart."""

    model_type = "llava_next"
    blocks_at = "vision_tower.encoder.layers"
    towers = TOWERS
    classes: ClassVar[tuple[str, ...]] = ("LlavaNextModel", "LlavaNextForConditionalGeneration")

    @classmethod
    def protect(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any], encoded: Mapping[str, Any]) -> None:
        parts: Any = model
        flow = trace.flow(cls.stack_name)
        assert flow.protected is not None
        for kind, output in encoded.items():
            values: Tensor = torch.cat(list(output.pooler_output))
            ends = (values == parts.image_newline.to(values.dtype)).all(-1)
            flow.protected = flow.protected | torch.zeros_like(flow.protected).masked_scatter(cls.placeholders(model, inputs, [kind]), ends)

    @classmethod
    def image_cost(cls, base: nn.Module, config: Any, size: tuple[int, int] | None) -> tuple[int, float]:
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        # Tiles are of one size, whatever the image's.
        tiles = _TILES if size is None else 1 + (-(-size[0] // vision.image_size)) * (-(-size[1] // vision.image_size))
        patches = side**2
        in_tower = patches + TOWERS[vision.model_type].layer_adapter.leading(vision)
        projector = linear_macs(base.get_submodule("multi_modal_projector"))
        tower = tower_macs(base.get_submodule("vision_tower"), base.get_submodule(cls.blocks_at), in_tower, vision.hidden_size)
        return tiles * patches, tiles * (tower + patches * projector)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision models, for images and videos."""

    model_type = "llava_onevision"
    classes: ClassVar[tuple[str, ...]] = ("LlavaOnevisionModel", "LlavaOnevisionForConditionalGeneration")
