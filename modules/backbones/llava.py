"""Adapter for LLaVA: a vision tower and a projector, whose features take the places of placeholder tokens in a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..cost.shape import StackShape
from ..tokens.trace import Trace
from .clip_vision_model import ClipVision
from .decoder import Decoder
from .layer_adapter import LayerAdapter
from .llama import Llama, Mistral, Qwen2, Qwen3
from .siglip_vision_model import SiglipVision
from .stack import Stack
from .vision import VisionModel

# Adapters of the supported language models and vision towers, by ``model_type``.
LANGUAGE_MODELS: dict[str, type[Decoder]] = {adapter.model_type: adapter for adapter in (Llama, Mistral, Qwen2, Qwen3)}
TOWERS: dict[str, type[VisionModel]] = {adapter.model_type: adapter for adapter in (ClipVision, SiglipVision)}
# Default number of text tokens beside one image: a question and its answer.
_TEXT_TOKENS = 64
_OTHERS = "put the stage into the language model, with stack = 'text' and scope = 'visual'"


class Llava(Decoder):
    """LLaVA models (arXiv 2304.08485). Stages are in the language model, and may touch the tokens of images; text is protected.

    The visual tokens of a row are its placeholders. All of transformers' code outside the layers runs at full length, so that positions,
    labels and the places in a cache are those of the whole row.
    """

    model_type = "llava"
    stack_name = "text"
    layers_at = "language_model.layers"
    classes: ClassVar[tuple[str, ...]] = ("LlavaModel", "LlavaForConditionalGeneration")
    refused_stacks: ClassVar[Mapping[str, str]] = {
        "vision": f"stages in the vision tower of a LLaVA are not supported yet; {_OTHERS}",
        "projector": f"stages at the projector of a LLaVA are not supported yet; {_OTHERS}",
    }

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        config: Any = model.config
        for key, known in (("text_config", LANGUAGE_MODELS), ("vision_config", TOWERS)):
            if (kind := getattr(config, key).model_type) not in known:
                raise ValueError(f"{key}.model_type = {kind!r} is not supported in a LLaVA: it must be one of {', '.join(known)}")

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        (text,) = super().stacks(model)
        return (replace(text, visual=True),)

    @classmethod
    def layers_adapter(cls, config: Any) -> type[LayerAdapter]:
        return LANGUAGE_MODELS[config.text_config.model_type].layer_adapter

    @classmethod
    def stack_config(cls, config: Any) -> PretrainedConfig:
        settings: PretrainedConfig = config.text_config
        return settings

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        """The language model, for rows of one image and text. Tower and projector, which run dense, count as the embedding of the image.

        Args:
            model: dense or compressed model.
            size: number of text tokens beside the image, 64 by default; or (height, width) of the image in pixels.
        """
        config, base = model.config, cls.base(model)
        tower: Any = base.get_submodule("vision_tower")
        seen = TOWERS[tower.config.model_type].shapes(tower, size if isinstance(size, tuple) else None)[""]
        visual = seen.protected + seen.routable - (config.vision_feature_select_strategy == "default")
        projector = _linear_macs(base.get_submodule("multi_modal_projector"))
        text = size if isinstance(size, int) else _TEXT_TOKENS
        shape = LANGUAGE_MODELS[config.text_config.model_type].layers_shape(config.text_config, text, visual)
        return {
            cls.stack_name: replace(
                shape,
                embed_macs=round(seen.model_macs(seen.dense_layers())) + visual * projector,
                head_macs_per_token=0 if base is model else _linear_macs(model.get_submodule("lm_head")),
            )
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
    def class_tokens(cls, config: Any) -> int:
        """Number of tokens of the tower that are no patches."""
        return int(config.vision_config.model_type == ClipVision.model_type)

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        flow = trace.flow(cls.stack_name)
        flow.visual = _placeholders(model, inputs)
        flow.protected = ~flow.visual if flow.protected is None else ~flow.visual | flow.protected


def _placeholders(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """(B, N) bool: the tokens that features of images replace.

    Raises:
        ValueError: the inputs do not tell which tokens these are.
    """
    config: Any = model.config
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if isinstance(ids, Tensor):
        of_ids: Tensor = ids == config.image_token_id
        return of_ids
    assert isinstance(embeds, Tensor)
    if inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs"):
        raise ValueError(
            "inputs_embeds without pixel_values: the places of visual tokens are unknown; call the model with input_ids, or with "
            "inputs_embeds that hold the embedding of image_token_id at these places, and pixel_values"
        )
    placeholder: Tensor = model.get_input_embeddings()(torch.full((), config.image_token_id, dtype=torch.long, device=embeds.device))
    of_embeds: Tensor = (embeds == placeholder).all(-1)
    return of_embeds


def _linear_macs(module: nn.Module) -> int:
    """MACs for one token of all linear layers of a module."""
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))
