"""Base classes of the adapters for vision transformers over image patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import SITES
from ..cost.shape import StackShape
from ..heads.base import PatchSegmentation
from ..site import TokenSpec
from ..tokens.trace import Trace
from .head_means import mean_over_heads
from .layer_adapter import LayerAdapter
from .model_adapter import ModelAdapter
from .stack import Stack


def pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a setting that may be one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class VisionLayers(LayerAdapter):
    """Pre-norm layers. The tokens are the leading tokens, then patches in reading order; positions are added before the layers.

    Attributes:
        has_cls: the first token is a CLS token, which the head reads.
        norm: attribute name of a layer's norm before attention.
        attention: attribute name of a layer's attention.
    """

    sites: ClassVar[tuple[str, ...]] = SITES
    has_cls: ClassVar[bool] = True
    norm: ClassVar[str] = "layernorm_before"
    attention: ClassVar[str] = "attention"

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return int(cls.has_cls)

    @classmethod
    def packs(cls, config: PretrainedConfig) -> bool:
        # Stochastic depth drops whole rows, and a packed batch has one row.
        return not getattr(config, "drop_path_rate", 0.0)

    @classmethod
    def keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        return cls._keys(layer, getattr(layer, cls.norm)(hidden_states))

    @classmethod
    def mean_keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        attention: Any = getattr(layer, cls.attention)
        return mean_over_heads(attention.k_proj, getattr(layer, cls.norm)(hidden_states), attention.head_dim)

    @classmethod
    def _keys(cls, layer: nn.Module, normed: Tensor) -> Tensor:
        attention: Any = getattr(layer, cls.attention)
        keys: Tensor = attention.k_proj(normed)
        return keys.view(*keys.shape[:2], -1, attention.head_dim).transpose(1, 2)

    @classmethod
    def cls_query_and_keys(cls, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        attention: Any = getattr(layer, cls.attention)
        normed = getattr(layer, cls.norm)(hidden_states)
        query = attention.q_proj(normed[:, :1]).view(normed.shape[0], 1, -1, attention.head_dim).transpose(1, 2)
        return query, cls._keys(layer, normed), attention.head_dim**-0.5


class VisionModel(ModelAdapter):
    """A model with ``pixel_values`` and one stack of vision layers.

    Attributes:
        averages: a head averages all routable tokens that leave the layers.
        interpolates: trained positions can be interpolated to images of another size.
    """

    layer_adapter: ClassVar[type[VisionLayers]]
    interpolates: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    @classmethod
    def stack_config(cls, config: Any) -> PretrainedConfig:
        # The config of a classifier on an image-text model's tower contains the tower's config.
        settings: PretrainedConfig = getattr(config, "vision_config", config)
        return settings

    @classmethod
    def image_input(cls, config: PretrainedConfig) -> tuple[int, int, int]:
        """Height, width and channels of the configured input."""
        vision: Any = cls.stack_config(config)
        return *pair(vision.image_size), vision.num_channels

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        vision: Any = stack.config
        down, across = pair(vision.patch_size)
        return TokenSpec(
            hidden_size=vision.hidden_size,
            classes=model.config.num_labels or 0,
            patch_values=down * across * vision.num_channels,
            has_cls=cls.layer_adapter.has_cls,
            family=cls.model_type,
        )

    @classmethod
    def every_token(cls, model: PreTrainedModel, stack: Stack) -> str | None:
        return "the head reads every patch" if isinstance(model, PatchSegmentation) else None

    @classmethod
    def intermediate(cls, config: Any) -> int:
        """Width of the MLP's hidden layer."""
        return int(config.intermediate_size)

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        config: Any = cls.stack_config(model.config)
        assert not isinstance(size, int)
        (height, width), (down, across) = size or pair(config.image_size), pair(config.patch_size)
        patches = (height // down) * (width // across)
        layers = {id(module) for module in cls.layers(model).modules()}
        outside = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in layers]
        shape = StackShape(
            hidden=config.hidden_size,
            intermediate=cls.intermediate(config),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            protected=cls.layer_adapter.leading(config),
            routable=patches,
            embed_macs=patches * config.hidden_size * config.num_channels * down * across,
            # Heads and poolers read one token, or one mean of tokens; dense heads read all patches, restored or not.
            head_macs=sum(module.in_features * module.out_features for module in outside)
            * (patches if isinstance(model, PatchSegmentation) else 1),
        )
        return {"": shape}

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        pixel_values = inputs.get("pixel_values")
        if isinstance(pixel_values, Tensor):
            # From the image, not the config: with interpolated positions images may have any size.
            config: Any = cls.stack_config(model.config)
            (down, across), flow = pair(config.patch_size), trace.flow()
            flow.pixel_values = pixel_values
            flow.grid = (pixel_values.shape[-2] // down, pixel_values.shape[-1] // across)

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        flow = trace.flow()
        state = flow.state
        weighs = state is not None and state.proportional and flow.under_head
        if not cls.averages or state is None or (state.valid is None and not weighs):
            return outputs
        if isinstance(outputs, tuple):
            raise ValueError("rows of a batch keep different numbers of tokens: leave return_dict out, or set it to True")
        hidden_states = getattr(outputs, "last_hidden_state", None)
        if hidden_states is not None and weighs:
            # The head takes the plain mean. With this scaling it is the mean over all source tokens (ToMe, arXiv 2210.09461).
            size = (state.size * state.routable).unsqueeze(-1)
            share = size * (state.tokens - flow.leading) / size.sum(1, keepdim=True).clamp(min=1e-6)
            outputs.last_hidden_state = hidden_states * torch.where(state.protected.unsqueeze(-1), 1.0, share).to(hidden_states.dtype)
        elif hidden_states is not None and state.valid is not None:
            # The head averages all slots after the leading ones. Padding is set to the mean of the real tokens, so the mean is unchanged.
            routable = state.routable.unsqueeze(-1)
            mean = hidden_states.masked_fill(~routable, 0.0).sum(1, keepdim=True) / routable.sum(1, keepdim=True).clamp(min=1)
            outputs.last_hidden_state = torch.where(state.valid.unsqueeze(-1), hidden_states, mean.to(hidden_states.dtype))
        return outputs
