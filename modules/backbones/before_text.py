"""Base class of the adapters for vision-language models with stages before the language model: in the tower and at the projector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..config import CompressionConfig
from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.trace import Trace
from .layer_adapter import LayerAdapter
from .multimodal import PIXELS, TEXT_TOKENS, Multimodal, linear_macs, takes_features
from .projector import ProjectorLayers
from .stack import Stack

VISION, PROJECTOR = "vision", "projector"
OTHERS = "put the stage into the language model, with stack = 'text' and scope = 'visual'"


@dataclass(frozen=True)
class Images:
    """What the tower and the projector make of the images of a forward.

    Attributes:
        features: for each image (T, width) features in the order of its placeholders, zeros where the patch is gone.
        gone: for each image (T,) bool, placeholders whose patch a stage removed; None if none was.
        deep: further features of each image, for each of the first layers of the language model (DeepStack); None without any.
    """

    features: Sequence[Tensor]
    gone: Sequence[Tensor] | None
    deep: Sequence[Sequence[Tensor]] | None = None


class BeforeText(Multimodal):
    """Vision-language models with stages in the tower, at the projector and in the language model; text is protected.

    All of transformers' code outside the layers runs at full length. Placeholders whose patch is gone are absent in the language model.

    Attributes:
        vision_at: name of the tower in ``base(model)``, with dots.
        projector_at: name of the projector in ``base(model)``, with dots.
        projector_layers: adapter of the projector.
    """

    feeds: ClassVar[Mapping[str, str]] = {VISION: PROJECTOR, PROJECTOR: "text"}
    vision_at: ClassVar[str] = "vision_tower"
    projector_at: ClassVar[str] = "multi_modal_projector"
    projector_layers: ClassVar[type[LayerAdapter]] = ProjectorLayers

    @classmethod
    def tower(cls, model: PreTrainedModel) -> Any:
        """The tower, with its ``config``."""
        return cls.base(model).get_submodule(cls.vision_at)

    @classmethod
    def tower_layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        """The tower's layers, up to the one whose output the projector reads."""
        layers = cls.base(model).get_submodule(cls.blocks_at)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @classmethod
    def tower_adapter(cls, config: Any) -> type[LayerAdapter]:
        """Adapter of the tower's layers, for the model's config."""
        raise NotImplementedError

    @classmethod
    def tower_shape(cls, model: PreTrainedModel, size: tuple[int, int] | None) -> StackShape:
        """StackShape of the tower, whose rows are images or their tiles; ``rows`` is their number for one image.

        Args:
            model: dense or compressed model.
            size: (height, width) of the image in pixels; None means the family's usual size.
        """
        raise NotImplementedError

    @classmethod
    def not_before_text(cls, model: PreTrainedModel) -> str | None:
        """Reason why this model can have no stages before the language model, with the cure; None if it can."""
        return None

    @classmethod
    def images(cls, base: PreTrainedModel, trace: Trace, kind: str, inputs: Mapping[str, Any]) -> Images:
        """Runs the tower and the projector with their stages.

        Args:
            base: base of the compressed model.
            trace: trace of the forward.
            kind: ``image`` or ``video``.
            inputs: inputs of the forward.

        Raises:
            ValueError: stages before the language model are impossible for these inputs.
        """
        raise NotImplementedError

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        before = [stack for stack in (VISION, PROJECTOR) if stack in config.stacks]
        if not before:
            return
        reason = cls.not_before_text(model)
        if not takes_features(cls.base(model)):
            reason = f"this version of transformers computes image features inside the model's forward; {OTHERS}"
        if reason is not None:
            raise ValueError(f"stack = {before[0]!r} is not offered: {reason}")

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        config = cls.tower(model).config
        projector = nn.ModuleList([cls.base(model).get_submodule(cls.projector_at)])
        return (
            Stack(VISION, cls.tower_layers(model), cls.tower_adapter(model.config), config),
            Stack(PROJECTOR, projector, cls.projector_layers, config),
            cls.main_stack(model),
        )

    @classmethod
    def depths(cls, config: PretrainedConfig) -> dict[str, int]:
        return {VISION: cls.tower_depth(config), PROJECTOR: 1, **super().depths(config)}

    @classmethod
    def tower_depth(cls, config: Any) -> int:
        """Number of the tower's layers that run until the projector reads their output."""
        return int(config.vision_config.num_hidden_layers)

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        if stack.name == cls.stack_name:
            return super().token_spec(model, stack)
        # As in the language model.
        return replace(cls.patch_spec(model, stack), classes=0)

    @classmethod
    def patch_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        """The TokenSpec of patches, in the tower and at the projector."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        """Tower, projector and language model, for rows of one image and text.

        Args:
            model: dense or compressed model.
            size: number of text tokens beside the image, 64 by default; or (height, width) of the image in pixels.
        """
        config, base = model.config, cls.base(model)
        seen = cls.tower_shape(model, size if isinstance(size, tuple) else None)
        read = cls.projector_shape(model, seen)
        text = size if isinstance(size, int) else TEXT_TOKENS
        leading, visual = (round(number * read.rows / read.joined) for number in (read.protected, read.routable))
        shape = cls.languages[config.text_config.model_type].layers_shape(config.text_config, text + leading, visual)
        head = 0 if base is model else linear_macs(model.get_submodule("lm_head"))
        return {VISION: seen, PROJECTOR: read, cls.stack_name: replace(shape, head_macs_per_token=head)}

    @classmethod
    def projector_shape(cls, model: PreTrainedModel, seen: StackShape) -> StackShape:
        """StackShape of the projector behind a tower of shape ``seen``."""
        return StackShape(
            hidden=seen.hidden,
            intermediate=0,
            layers=1,
            heads=1,
            protected=0,
            routable=seen.routable,
            embed_macs=0,
            head_macs=0,
            macs_per_token=linear_macs(cls.base(model).get_submodule(cls.projector_at)),
            rows=seen.rows,
        )

    @classmethod
    def joining(cls, shape: StackShape, unit: int) -> StackShape:
        """StackShape of a projector that joins units of so many patches, of one that maps each patch."""
        return replace(shape, macs_per_token=(shape.macs_per_token or 0) / unit, joined=unit)

    @classmethod
    def runs_tower(cls, model: PreTrainedModel) -> bool:
        """True if the compressed model calls the tower's layers itself."""
        return cls.staged(model)

    @classmethod
    def leaves_to_model(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
        """True if transformers' own functions compute the features of these inputs. Raises ValueError if stages do not allow that."""
        return False

    @classmethod
    def staged(cls, model: PreTrainedModel) -> bool:
        """True if the compressed model has stages before the language model."""
        early: Any = [layer for stack in cls.stacks(model) if stack.name != cls.stack_name for layer in stack.layers]
        return any(not layer.plan.dense for layer in early)

    @classmethod
    def shortens(cls, model: PreTrainedModel) -> bool:
        """True if a stage of the tower or the projector removes visual tokens."""
        early: Any = [layer for stack in cls.stacks(model) if stack.name != cls.stack_name for layer in stack.layers]
        return any(not stage.bypass for layer in early if not layer.plan.dense for stage in layer._modules.get("stages", {}).values())

    @classmethod
    def encode(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> dict[str, Any]:
        # The base is called by the model with a head, with the same trace.
        if cls.base(model) is not model:
            return {}
        if not cls.runs_tower(model) or cls.leaves_to_model(model, inputs):
            return super().encode(model, trace, inputs)
        given, encoded, gone = inputs.get("mm_encoder_outputs") or {}, dict[str, Any](), dict[str, Tensor]()
        for kind, pixels in PIXELS.items():
            if given.get(kind) is not None:
                encoded[kind], gone[kind] = cls.unmark(given[kind])
            elif inputs.get(pixels) is not None:
                images = cls.images(model, trace, kind, inputs)
                encoded[kind] = cls.encoded(images.features, images.deep)
                if images.gone is not None:
                    gone[kind] = torch.cat(list(images.gone))
        if not encoded:
            return {}
        if gone and cls.shortens(model):
            flow = trace.flow(cls.stack_name)
            assert flow.visual is not None
            absent = torch.zeros_like(flow.visual)
            for kind, marks in gone.items():
                absent = absent.masked_scatter(cls.placeholders(model, inputs, [kind]), marks)
            flow.absent = absent
        cls.protect(model, trace, inputs, encoded)
        return {**{PIXELS[kind]: None for kind in encoded}, "mm_encoder_outputs": encoded}

    @classmethod
    def encoded_images(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        base, trace, found = cls.base(model), Trace(), dict[str, Any]()
        assert isinstance(base, PreTrainedModel)
        if not cls.runs_tower(model) or cls.leaves_to_model(model, inputs):
            return None
        for kind, pixels in PIXELS.items():
            if inputs.get(pixels) is not None:
                # In this form transformers can repeat features for beams and cut them into chunks.
                found[kind] = cls.marked(cls.images(base, trace, kind, inputs))
        return found or None

    @classmethod
    def encoded(cls, features: Sequence[Tensor], deep: Sequence[Sequence[Tensor]] | None = None) -> Any:
        """Features by image, in the form that transformers hands on."""
        output: Any = BaseModelOutputWithPooling()
        output.pooler_output = list(features)
        return output

    @classmethod
    def marked(cls, images: Images) -> Any:
        """Like ``encoded``, with NaN in place of the features of patches that are gone."""
        if images.gone is None:
            return cls.encoded(images.features, images.deep)
        marked = [part.masked_fill(gone[:, None], math.nan) for part, gone in zip(images.features, images.gone, strict=True)]
        return cls.encoded(marked, images.deep)

    @classmethod
    def unmark(cls, output: Any) -> tuple[Any, Tensor]:
        """``encoded`` features, and (T,) bool of the patches that are gone, from those of ``marked``."""
        features = torch.cat(list(output.pooler_output))
        gone = features.isnan().all(-1)
        return cls.encoded([features.masked_fill(gone[:, None], 0.0)], getattr(output, "deepstack_features", None)), gone

    @classmethod
    def rows_ratio(cls, trace: Trace, stack: str) -> float:
        flow = trace.flow(cls.stack_name)
        if stack == cls.stack_name or flow.visual is None:
            return 1.0
        return 0.0 if trace.blank else trace.flow(VISION).rows / len(flow.visual)
