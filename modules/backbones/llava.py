"""Adapter for LLaVA: a vision tower and a projector, whose features take the places of placeholder tokens in a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.trace import Trace
from .before_text import OTHERS, PROJECTOR, VISION, BeforeText, Images
from .clip_vision_model import ClipVision
from .image_features import RowFeatures, TowerInput, image_features
from .layer_adapter import LayerAdapter
from .multimodal import takes_features
from .siglip_vision_model import SiglipVision
from .stack import Stack
from .tiles import Tile
from .vision import pair

# Adapters of the supported vision towers, by ``model_type``.
TOWERS: dict[str, type[ClipVision]] = {adapter.model_type: adapter for adapter in (ClipVision, SiglipVision)}


class LlavaTower(BeforeText):
    """What the LLaVA families have in common: a CLIP or SigLIP tower, of which one layer is read, and a map of each of its tokens."""

    towers = TOWERS
    blocks_at = "vision_tower.encoder.layers"

    @classmethod
    def not_before_text(cls, model: PreTrainedModel) -> str | None:
        config: Any = model.config
        if not isinstance(config.vision_feature_layer, int):
            return f"vision_feature_layer = {config.vision_feature_layer} joins features of several layers, whose tokens would differ; {OTHERS}"
        if config.vision_feature_select_strategy == "default" and not cls.class_tokens(config):
            return "vision_feature_select_strategy = 'default' drops the first patch of a tower without class token"
        return None

    @classmethod
    def tower_layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        # Layers above the one whose output the projector reads have no effect.
        return TOWERS[cls.tower(model).config.model_type].layers(cls.tower(model))[: cls.tower_depth(model.config)]

    @classmethod
    def tower_adapter(cls, config: Any) -> type[LayerAdapter]:
        return TOWERS[config.vision_config.model_type].layer_adapter

    @classmethod
    def tower_depth(cls, config: Any) -> int:
        layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
        if not isinstance(layer, int):
            return int(layers)
        return int(layer if layer >= 0 else layers + 1 + layer)

    @classmethod
    def patch_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        spec = TOWERS[stack.config.model_type].token_spec(cls.tower(model), stack)
        return replace(spec, family=cls.model_type, has_cls=spec.has_cls and stack.name == VISION)

    @classmethod
    def tower_shape(cls, model: PreTrainedModel, size: tuple[int, int] | None) -> StackShape:
        tower = cls.tower(model)
        seen = TOWERS[tower.config.model_type].shapes(tower, cls.tile_size(model.config, size))[""]
        # The tower's own head does not run, nor do layers behind the features in a compressed model.
        layers = cls.tower_depth(model.config) if cls.runs_tower(model) else seen.layers
        unread = (seen.layers - layers) * seen.layer_macs(seen.dense_layers()[0])
        return replace(seen, layers=layers, head_macs=0, head_macs_per_token=0, dense_only_macs=unread, rows=cls.tiles(model.config, size))

    @classmethod
    def tile_size(cls, config: Any, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """(height, width) of what the tower sees at once of an image of this size; None means its configured size."""
        return size

    @classmethod
    def tiles(cls, config: Any, size: tuple[int, int] | None) -> int:
        """Number of rows of the tower for an image of this size."""
        return 1

    @classmethod
    def projector_shape(cls, model: PreTrainedModel, seen: StackShape) -> StackShape:
        skipped = cls.skipped(model.config)
        return replace(
            super().projector_shape(model, seen),
            protected=max(0, seen.protected - skipped),
            routable=seen.routable - max(0, skipped - seen.protected),
        )

    @classmethod
    def skipped(cls, config: Any) -> int:
        """Number of tokens at the start of a tower's row that the projector does not read."""
        return int(config.vision_feature_select_strategy == "default")

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [Tile(pixels, side, side, cls.leading_tokens(config)) for pixels in inputs.get("pixel_values", ())]

    @classmethod
    def image_tokens(cls, config: Any) -> int:
        """Number of tokens that stand for one image, or one of its tiles."""
        return cls.patches(config) + cls.class_tokens(config) - cls.skipped(config)

    @classmethod
    def patches(cls, config: Any) -> int:
        """Number of patches of one image, or one of its tiles."""
        number: int = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return number

    @classmethod
    def leading_tokens(cls, config: Any) -> int:
        """Number of visual tokens of an image that are no patches and that no stage may touch: 1 if the class token is used."""
        return max(0, cls.image_tokens(config) - cls.patches(config))

    @classmethod
    def class_tokens(cls, config: Any) -> int:
        """Number of tokens of the tower that are no patches."""
        return int(config.vision_config.model_type == ClipVision.model_type)

    @classmethod
    def bind_images(cls, model: PreTrainedModel, trace: Trace, pixel_values: Tensor) -> None:
        """Stores on the flows what layers and parts need of (I, channels, height, width) rows of the tower."""
        down, across = pair(cls.tower(model).config.patch_size)
        trace.flow(VISION).leading = cls.class_tokens(model.config)
        trace.flow(PROJECTOR).leading = cls.leading_tokens(model.config)
        for flow in (trace.flow(VISION), trace.flow(PROJECTOR)):
            flow.pixel_values, flow.rows = pixel_values, len(pixel_values)
            flow.grid = (pixel_values.shape[-2] // down, pixel_values.shape[-1] // across)

    @classmethod
    def rows_of(
        cls, base: PreTrainedModel, trace: Trace, pixel_values: Tensor, inputs: Mapping[str, Any], unused: Tensor | None = None
    ) -> RowFeatures:
        """Features of each row of the tower.

        Args:
            base: base of the compressed model.
            trace: trace of the forward.
            pixel_values: (I, channels, height, width) rows of the tower.
            inputs: inputs of the forward.
            unused: (I, patches) bool, patches that the language model does not get; None if it gets all. Stages in the tower leave them as
                they are, so that none of the others is merged into one and lost.
        """
        for key in ("vision_feature_layer", "vision_feature_select_strategy"):
            if (given := inputs.get(key)) is not None and given != getattr(base.config, key):
                raise ValueError(f"{key} = {given!r} in a forward: a compressed {cls.model_type} uses that of its config")
        cls.bind_images(base, trace, pixel_values)
        vision, projector, _ = cls.stacks(base)
        if unused is not None:
            trace.flow(VISION).protected = functional.pad(unused, (cls.class_tokens(base.config), 0))
        hidden_states = TOWERS[vision.config.model_type].embed(cls.tower(base), pixel_values)
        return image_features(TowerInput(hidden_states, cls.skipped(base.config), unused=unused), vision, projector, trace)

    @classmethod
    def runs_tower(cls, model: PreTrainedModel) -> bool:
        # transformers runs all layers, and reads features by hooks.
        config: Any = model.config
        return takes_features(cls.base(model)) and isinstance(config.vision_feature_layer, int)


class Llava(LlavaTower):
    """LLaVA models (arXiv 2304.08485), with stages in the tower, at the projector and in the language model; text is protected.

    The visual tokens of a row are its placeholders.
    """

    model_type = "llava"
    # Stages in the language model work with any version of transformers.
    needs_features = False
    tower_at = "vision_tower"
    classes: ClassVar[tuple[str, ...]] = ("LlavaModel", "LlavaForConditionalGeneration")

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        flow, leading = trace.flow(cls.stack_name), cls.leading_tokens(model.config)
        if leading:
            assert flow.visual is not None
            assert flow.protected is not None
            # Placeholders are those of one image after the other.
            number = (flow.visual.flatten().cumsum(0) - 1).view_as(flow.visual) % cls.image_tokens(model.config)
            flow.protected = flow.protected | (number < leading)
        if isinstance(pixel_values := inputs.get("pixel_values"), Tensor):
            cls.bind_images(model, trace, pixel_values)

    @classmethod
    def encode(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return super().encode(model, trace, inputs) if cls.runs_tower(model) else {}

    @classmethod
    def images(cls, base: PreTrainedModel, trace: Trace, kind: str, inputs: Mapping[str, Any]) -> Images:
        made = cls.rows_of(base, trace, inputs["pixel_values"], inputs)
        return Images(list(made.values), None if made.gone is None else list(made.gone))
