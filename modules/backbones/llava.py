"""Adapter for LLaVA: a vision tower and a projector, whose features take the places of placeholder tokens in a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..config import CompressionConfig
from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.trace import Trace
from .clip_vision_model import ClipVision
from .image_features import image_features
from .multimodal import TEXT_TOKENS, Multimodal, linear_macs, takes_features
from .projector import ProjectorLayers
from .siglip_vision_model import SiglipVision
from .stack import Stack
from .vision import pair

# Adapters of the supported vision towers, by ``model_type``.
TOWERS: dict[str, type[ClipVision]] = {adapter.model_type: adapter for adapter in (ClipVision, SiglipVision)}
_OTHERS = "put the stage into the language model, with stack = 'text' and scope = 'visual'"
VISION, PROJECTOR = "vision", "projector"


class Llava(Multimodal):
    """LLaVA models (arXiv 2304.08485), with stages in the tower, at the projector and in the language model; text is protected.

    The visual tokens of a row are its placeholders. All of transformers' code outside the layers runs at full length, so that positions,
    labels and the places in a cache are those of the whole row. Placeholders whose patch is gone are absent in the language model.
    """

    model_type = "llava"
    towers = TOWERS
    # Stages in the language model work with any version of transformers.
    needs_features = False
    tower_at = "vision_tower"
    classes: ClassVar[tuple[str, ...]] = ("LlavaModel", "LlavaForConditionalGeneration")
    feeds: ClassVar[Mapping[str, str]] = {VISION: PROJECTOR, PROJECTOR: "text"}

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        before = [stack for stack in (VISION, PROJECTOR) if stack in config.stacks]
        if not before:
            return
        given: Any = model.config
        where = f"stack = {before[0]!r} is not offered"
        if not takes_features(cls.base(model)):
            raise ValueError(f"{where}: this version of transformers computes image features inside LLaVA's forward; {_OTHERS}")
        if not isinstance(given.vision_feature_layer, int):
            raise ValueError(
                f"{where}: vision_feature_layer = {given.vision_feature_layer} joins features of several layers, whose tokens would differ; "
                f"{_OTHERS}"
            )
        if given.vision_feature_select_strategy == "default" and not cls.class_tokens(given):
            raise ValueError(f"{where}: vision_feature_select_strategy = 'default' drops the first patch of a tower without class token")

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        tower, config = cls._tower(model), cls._tower(model).config
        # Layers above the one whose output the projector reads have no effect.
        layers = TOWERS[config.model_type].layers(tower)[: cls._feature_layers(model.config)]
        projector = nn.ModuleList([cls.base(model).get_submodule("multi_modal_projector")])
        return (
            Stack(VISION, layers, TOWERS[config.model_type].layer_adapter, config),
            Stack(PROJECTOR, projector, ProjectorLayers, config),
            cls.main_stack(model),
        )

    @classmethod
    def depths(cls, config: PretrainedConfig) -> dict[str, int]:
        return {VISION: cls._feature_layers(config), PROJECTOR: 1, **super().depths(config)}

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        if stack.name == cls.stack_name:
            return super().token_spec(model, stack)
        spec = TOWERS[stack.config.model_type].token_spec(cls._tower(model), stack)
        return replace(spec, family=cls.model_type, has_cls=spec.has_cls and stack.name == VISION)

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        """Tower, projector and language model, for rows of one image and text.

        Args:
            model: dense or compressed model.
            size: number of text tokens beside the image, 64 by default; or (height, width) of the image in pixels.
        """
        config, base, tower = model.config, cls.base(model), cls._tower(model)
        seen = TOWERS[tower.config.model_type].shapes(tower, size if isinstance(size, tuple) else None)[""]
        skipped = int(config.vision_feature_select_strategy == "default")
        leading = max(0, seen.protected - skipped)
        visual = seen.routable - max(0, skipped - seen.protected)
        text = size if isinstance(size, int) else TEXT_TOKENS
        shape = cls.languages[config.text_config.model_type].layers_shape(config.text_config, text + leading, visual)
        head = 0 if base is model else linear_macs(model.get_submodule("lm_head"))
        # The tower's own head does not run, nor do layers behind the features in a compressed model.
        layers = cls._feature_layers(config) if cls._runs_tower(model) else seen.layers
        unread = (seen.layers - layers) * seen.layer_macs(seen.dense_layers()[0])
        return {
            VISION: replace(seen, layers=layers, head_macs=0, head_macs_per_token=0, dense_only_macs=unread),
            PROJECTOR: StackShape(
                hidden=seen.hidden,
                intermediate=0,
                layers=1,
                heads=1,
                protected=leading,
                routable=visual,
                embed_macs=0,
                head_macs=0,
                macs_per_token=linear_macs(base.get_submodule("multi_modal_projector")),
            ),
            cls.stack_name: replace(shape, head_macs_per_token=head),
        }

    @classmethod
    def image_tokens(cls, config: Any) -> int:
        """Number of tokens that stand for one image."""
        return cls.patches(config) + cls.class_tokens(config) - int(config.vision_feature_select_strategy == "default")

    @classmethod
    def patches(cls, config: Any) -> int:
        """Number of patches of one image."""
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
            cls._bind_images(model, trace, pixel_values)

    @classmethod
    def _bind_images(cls, model: PreTrainedModel, trace: Trace, pixel_values: Tensor) -> None:
        down, across = pair(cls._tower(model).config.patch_size)
        trace.flow(VISION).leading = cls.class_tokens(model.config)
        trace.flow(PROJECTOR).leading = cls.leading_tokens(model.config)
        for flow in (trace.flow(VISION), trace.flow(PROJECTOR)):
            flow.pixel_values = pixel_values
            flow.grid = (pixel_values.shape[-2] // down, pixel_values.shape[-1] // across)

    @classmethod
    def encode(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> dict[str, Any]:
        # The base is called by the model with a head, with the same trace.
        if cls.base(model) is not model or not cls._runs_tower(model):
            return {}
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            features = torch.cat(list(encoded.pooler_output))
            gone = features.isnan().all(-1)
            features = features.masked_fill(gone[:, None], 0.0)
        elif isinstance(inputs.get("pixel_values"), Tensor):
            for key in ("vision_feature_layer", "vision_feature_select_strategy"):
                if (given := inputs.get(key)) is not None and given != getattr(model.config, key):
                    raise ValueError(f"{key} = {given!r} in a forward: a compressed LLaVA uses that of its config")
            features, gone = (part.flatten(0, 1) for part in cls._features(model, trace, inputs["pixel_values"]))
        else:
            return {}
        if cls._shortens(model):
            flow = trace.flow(cls.stack_name)
            assert flow.visual is not None
            flow.absent = torch.zeros_like(flow.visual).masked_scatter(flow.visual, gone)
        return {"pixel_values": None, "mm_encoder_outputs": {"image": _encoded([features])}}

    @classmethod
    def encoded_images(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        pixel_values, base = inputs.get("pixel_values"), cls.base(model)
        if not isinstance(pixel_values, Tensor) or not cls._runs_tower(model):
            return None
        assert isinstance(base, PreTrainedModel)
        trace = Trace()
        cls._bind_images(base, trace, pixel_values)
        features, gone = cls._features(base, trace, pixel_values)
        # In this form transformers can repeat features for beams and cut them into chunks.
        return {"image": _encoded(list(features.masked_fill(gone[..., None], math.nan)))}

    @classmethod
    def _features(cls, base: PreTrainedModel, trace: Trace, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features by the tower and the projector with their stages: the result of ``image_features``."""
        vision, projector, _ = cls.stacks(base)
        hidden_states = TOWERS[vision.config.model_type].embed(cls._tower(base), pixel_values)
        skipped = int(base.config.vision_feature_select_strategy == "default")
        return image_features(hidden_states, vision, projector.layers[0], skipped, trace)

    @classmethod
    def _runs_tower(cls, model: PreTrainedModel) -> bool:
        """True if the compressed model calls the tower's layers itself. transformers runs all of them, and reads features by hooks."""
        return takes_features(cls.base(model)) and isinstance(model.config.vision_feature_layer, int)

    @classmethod
    def _shortens(cls, model: PreTrainedModel) -> bool:
        """True if a stage of the tower or the projector removes visual tokens."""
        layers: Any = [layer for stack in cls.stacks(model) if stack.name != cls.stack_name for layer in stack.layers]
        return any(not stage.bypass for layer in layers if not layer.plan.dense for stage in layer._modules.get("stages", {}).values())

    @classmethod
    def rows_ratio(cls, trace: Trace, stack: str) -> float:
        flow = trace.flow(cls.stack_name)
        if stack == cls.stack_name or flow.visual is None:
            return 1.0
        images = trace.flow(VISION).pixel_values
        return 0.0 if images is None else len(images) / len(flow.visual)

    @classmethod
    def _tower(cls, model: PreTrainedModel) -> Any:
        return cls.base(model).get_submodule(cls.tower_at)

    @classmethod
    def _feature_layers(cls, config: Any) -> int:
        """Number of the tower's layers that run until its features are read."""
        layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
        if not isinstance(layer, int):
            return int(layers)
        return int(layer if layer >= 0 else layers + 1 + layer)


def _encoded(features: list[Tensor]) -> Any:
    """Features by image, in the form that transformers hands on."""
    output: Any = BaseModelOutputWithPooling()
    output.pooler_output = features
    return output
