"""Adapters for the projector of a vision-language model, as a stack of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..tokens.gather import take
from ..tokens.state import TokenState
from ..tokens.units import Units
from .layer_adapter import LayerAdapter

_NO_ATTENTION = "a projector has no attention"


class ProjectorLayers(LayerAdapter):
    """A projector that maps each token alone. A stage before it chooses among the tower's features, once for all later layers."""

    sites: ClassVar[tuple[str, ...]] = ("before",)
    padding_on_flow = True
    positional: ClassVar[tuple[str, ...]] = ()
    no_keys = _NO_ATTENTION
    no_cls_query = _NO_ATTENTION
    no_query = _NO_ATTENTION
    no_key_bias = _NO_ATTENTION

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 0

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class JoiningProjector(ProjectorLayers):
    """A projector that maps squares of patches alone: the values of a square's patches, one after the other, are one token."""

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"units": Units.of(state, inputs["units"], inputs["unit"])}

    @classmethod
    def call(cls, forward: Callable[..., Any], hidden_states: Tensor, inputs: Mapping[str, Any]) -> Any:
        units: Units = inputs["units"]
        return forward(take(hidden_states, units.order).reshape(len(hidden_states), -1, units.size * hidden_states.shape[-1]))
