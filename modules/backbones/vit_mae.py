"""The encoder of ViT-MAE of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from transformers import PretrainedConfig, PreTrainedModel

from ..counting import BackboneShape
from ..scorers.base import TokenSpec
from ..state import Trace
from .vision import VisionBackbone
from .vit import ViTBackbone


class ViTMaeBackbone(ViTBackbone):
    """A ViT whose layers see a random subset of the patches, in random order.

    A token's index tells nothing of its place in the image, and which patch it is shows only in the model's outputs
    (``ids_restore``). So the trace carries no grid and no pixels, and scorers that need them are refused.
    """

    model_type = "vit_mae"
    classes: ClassVar[tuple[str, ...]] = ("ViTMAEModel",)
    refused: ClassVar[dict[str, str]] = {
        "ViTMAEForPreTraining": "its decoder needs every token that its masking left; compress the encoder alone, model.vit"
    }

    @classmethod
    def token_spec(cls, config: PretrainedConfig) -> TokenSpec:
        return replace(super().token_spec(config), patch_values=0, shuffled=True)

    @classmethod
    def shape(cls, model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> BackboneShape:
        shape = super().shape(model, image_size)
        # All patches are embedded; then the model masks, by its own rounding.
        return replace(shape, patches=int(shape.patches * (1 - model.config.mask_ratio)))

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        # Past what all image backbones note there.
        super(VisionBackbone, cls).bind_inputs(model, trace, inputs)
