"""Adapter for the projector of a vision-language model, as a stack of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig

from ..tokens.state import TokenState
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

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 0

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {}
