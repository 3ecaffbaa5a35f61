"""Base class of the adapters for vision-language models: features of images take the places of placeholder tokens in a language model."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import CompressionConfig
from ..site import TokenSpec
from ..tokens.trace import Trace
from .decoder import Decoder
from .layer_adapter import LayerAdapter
from .llama import Llama, Mistral, Qwen2, Qwen3
from .stack import Stack
from .tiles import Tile
from .vision import pair

# Adapters of the supported language models, by ``model_type``.
LANGUAGE_MODELS: dict[str, type[Decoder]] = {adapter.model_type: adapter for adapter in (Llama, Mistral, Qwen2, Qwen3)}
# Default number of text tokens beside one image: a question and its answer.
TEXT_TOKENS = 64
# Input of each kind of visual tokens.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Multimodal(Decoder):
    """Vision-language models with stages in the language model, which may touch visual tokens; text is protected.

    The visual tokens of a row are its placeholders. All of transformers' code outside the layers runs at full length, so that positions,
    labels and the places in a cache are those of the whole row.

    Attributes:
        blocks_at: name of the tower's list of layers in ``base(model)``, with dots.
        languages: adapters of the supported language models, by ``model_type``.
        towers: supported ``model_type`` of the tower; None supports all.
        needs_features: features of images must be computed before the model's forward.
        image_inputs: names of the inputs of a forward that describe images.
        images_by_row: ``pixel_values`` are (B, images, …), with all images of a row in one entry.
        no_packing: reason why several chats cannot share a row; None if they can.
        types_at: name of the input that tells tokens of images (1) from text (0); None if the model needs none.
    """

    stack_name = "text"
    layers_at = "language_model.layers"
    # The learned token at the end of a line, of the families with tiles, is as wide as the projector's output.
    parts_at: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vision_tower",),
        "projector": ("multi_modal_projector", "image_newline"),
    }
    blocks_at: ClassVar[str]
    languages: ClassVar[Mapping[str, type[Decoder]]] = LANGUAGE_MODELS
    towers: ClassVar[Collection[str] | None] = None
    needs_features: ClassVar[bool] = True
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    images_by_row: ClassVar[bool] = False
    no_packing: ClassVar[str | None] = None
    types_at: ClassVar[str | None] = None

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        cls._check_parts(model.config)
        if cls.needs_features and not takes_features(cls.base(model)):
            raise ValueError(
                f"{cls.model_type} needs a version of transformers whose forward takes mm_encoder_outputs, 5.23 for example: upgrade it"
            )

    @classmethod
    def main_stack(cls, model: PreTrainedModel) -> Stack:
        return replace(super().main_stack(model), visual=True, whole_until=cls.whole_until(model))

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        # An answer is no label of a visual token.
        return replace(super().token_spec(model, stack), classes=0)

    @classmethod
    def _check_parts(cls, config: Any) -> None:
        for key, known in (("text_config", cls.languages), ("vision_config", cls.towers)):
            kind = getattr(config, key).model_type
            if known is not None and kind not in known:
                raise ValueError(
                    f"{key}.model_type = {kind!r} is not supported in a {cls.model_type}: it must be one of {', '.join(known)}"
                )

    @classmethod
    def layers_adapter(cls, config: Any) -> type[LayerAdapter]:
        # Also asked before a model is checked, or built.
        cls._check_parts(config)
        return cls.languages[config.text_config.model_type].layer_adapter

    @classmethod
    def stack_config(cls, config: Any) -> PretrainedConfig:
        settings: PretrainedConfig = config.text_config
        return settings

    @classmethod
    def head_counts_places(cls, model: PreTrainedModel) -> bool:
        # Answers are read at their places in the whole row.
        return True

    @classmethod
    def forward_inputs(cls, config: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of a forward that a batch of chats holds, or that follow from them.

        Args:
            config: config of the model.
            batch: ``input_ids`` (B, N), and if there are any ``attention_mask`` and what a processor made of the images.
        """
        given = {name: batch[name] for name in ("input_ids", "attention_mask", *cls.image_inputs) if name in batch}
        if cls.types_at is not None:
            given[cls.types_at] = (given["input_ids"] == config.image_token_id).int()
        return given

    @classmethod
    def packed_positions(cls, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        """``position_ids`` of packed chats as the base model takes them.

        Args:
            model: base model, dense or compressed.
            batch: ``input_ids``, ``position_ids`` (0 … in each chat) and ``documents``, each (B, N), and what describes the images.
        """
        given: Tensor = batch["position_ids"]
        return given

    @classmethod
    def plain_images(cls, config: Any, number: int) -> dict[str, Tensor]:
        """Inputs for a number of empty images, each as small as the family can have it, in rows of one image; by default
        of the tower's own size.

        Args:
            config: config of the model.
            number: number of images, at least 1.
        """
        tower = config.vision_config
        return {"pixel_values": torch.zeros(number, tower.num_channels, *pair(tower.image_size))}

    @classmethod
    def pictures(cls, config: Any, inputs: Mapping[str, Tensor]) -> list[Tile]:
        """The pictures that the tower reads in these inputs, in the order of their placeholders.

        Args:
            config: config of the model.
            inputs: inputs of a forward, or those that describe images alone.
        """
        raise NotImplementedError

    @classmethod
    def placeholder_ids(cls, config: Any, kinds: Collection[str] = tuple(PIXELS)) -> list[int]:
        """Ids of the tokens that features of images and videos replace."""
        found = (getattr(config, f"{kind}_token_id", None) for kind in kinds)
        return [number for number in found if number is not None]

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        flow = trace.flow(cls.stack_name)
        flow.visual = cls.placeholders(model, inputs)
        for stack in cls.feeds:
            trace.flow(stack).blank = trace.blank
        flow.protected = ~flow.visual if flow.protected is None else ~flow.visual | flow.protected

    @classmethod
    def encode(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Features of images and videos, by the model's own functions, which get no trace."""
        # The base is called by the model with a head, with the same trace.
        if cls.base(model) is not model:
            return {}
        given, used, encoded = inputs.get("mm_encoder_outputs") or {}, set[str](), dict[str, Any]()
        for kind, pixels in PIXELS.items():
            function = getattr(model, f"get_{kind}_features", None)
            if function is None or inputs.get(pixels) is None:
                continue
            names = [name for name in inspect.signature(function).parameters if inputs.get(name) is not None]
            encoded[kind] = function(**{name: inputs[name] for name in names}, return_dict=True)
            used.add(pixels)
        if not encoded and not given:
            return {}
        encoded = {**given, **encoded}
        cls.protect(model, trace, inputs, encoded)
        return {**dict.fromkeys(used), "mm_encoder_outputs": encoded}

    @classmethod
    def protect(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any], encoded: Mapping[str, Any]) -> None:
        """Marks placeholders that no stage may touch, such as the ends of lines, on the flow of the language model.

        Args:
            model: base of the compressed model.
            trace: trace of the forward.
            inputs: inputs of the forward.
            encoded: output of the tower and the projector by kind, ``image`` and ``video``.
        """

    @classmethod
    def placeholders(cls, model: PreTrainedModel, inputs: Mapping[str, Any], kinds: Collection[str] = tuple(PIXELS)) -> Tensor:
        """(B, N) bool: the tokens that features of images and videos replace.

        Raises:
            ValueError: the inputs do not tell which tokens these are.
        """
        config: Any = model.config
        numbers = cls.placeholder_ids(config, kinds)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if isinstance(ids, Tensor):
            # Without a tensor of the ids, whose copy to the device the host would wait for.
            of_ids = torch.zeros_like(ids, dtype=torch.bool)
            for number in numbers:
                of_ids = of_ids | (ids == number)
            return of_ids
        assert isinstance(embeds, Tensor)
        if not any(inputs.get(name) is not None for name in PIXELS.values()) and not inputs.get("mm_encoder_outputs"):
            raise ValueError(
                "inputs_embeds without pixel_values: the places of visual tokens are unknown; call the model with input_ids, or with "
                "inputs_embeds that hold the embedding of image_token_id at these places, and pixel_values"
            )
        placeholders: Tensor = model.get_input_embeddings()(torch.tensor(numbers, device=embeds.device))
        return (embeds[..., None, :] == placeholders).all(-1).any(-1)


def takes_features(base: nn.Module) -> bool:
    """True if this version of transformers takes features that were computed beforehand."""
    return "mm_encoder_outputs" in inspect.signature(type(base).forward).parameters


def linear_macs(module: nn.Module) -> int:
    """MACs for one token of all linear layers of a module, without those of its stages."""
    own = [part for name, part in module.named_modules() if not name.startswith("stages.")]
    return sum(part.in_features * part.out_features for part in own if isinstance(part, nn.Linear))


def check_no_early_drop(config: CompressionConfig, first: int, reason: str) -> None:
    """Raises ValueError if a stage removes tokens before layer ``first`` of the language model."""
    early = [stage.key for stage in config.of_stack(Multimodal.stack_name) if not stage.bypass and stage.place < first]
    if early:
        raise ValueError(f"stages {', '.join(early)} remove tokens before layer {first}, and {reason}: take layer {first} or a later one")
