"""Types shared by scorers, selectors, mergers and estimators: the tokens that a part is built for, and the inputs that it receives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from .tokens.flow import Flow
from .tokens.state import TokenState
from .tokens.trace import Trace


@dataclass(frozen=True)
class TokenSpec:
    """The tokens that a part is built for.

    Attributes:
        hidden_size: width C of the tokens.
        classes: number of classes of the task.
        patch_values: values in one image patch, pixels times channels; 0 if tokens are not image patches.
        has_cls: the first token is a CLS token, which the task head reads.
        family: name of the model family, for error messages.
        causal: the model is causal: the output at a token does not depend on later tokens.
        unit: tokens of a square that a later layer joins into one, so that a stage keeps or removes them together; 1 for none.
    """

    hidden_size: int
    classes: int
    patch_values: int = 0
    has_cls: bool = False
    family: str = "this backbone"
    causal: bool = False
    unit: int = 1

    @property
    def side(self) -> int:
        """Side of a unit's square, in tokens."""
        return math.isqrt(self.unit)


class LayerView(Protocol):
    """The methods of a layer adapter that parts may call."""

    def mean_keys(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """(B, M, D) keys that the layer's attention computes from its (B, M, C) input, including the norm before attention, as means over
        heads."""

    def cls_query_and_keys(self, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        """Query of the first token (B, H, 1, D), keys of all tokens (B, H, M, D) and the attention scale of this layer."""

    def query_and_keys(
        self, layer: nn.Module, hidden_states: Tensor, slot: Tensor, state: TokenState, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, float]:
        """Query (B, H, 1, D) of the token at ``slot`` (B, 1), keys (B, G, M, D) of all tokens, with positions, and the attention scale."""


@dataclass(frozen=True)
class SiteInput:
    """The inputs of a part.

    Attributes:
        hidden_states: (B, M, C) hidden states at the site.
        state: TokenState of these tokens.
        trace: Trace of the current forward.
        flow: Flow of the stack that contains the layer.
        stage: index of the stage among the model's stages.
        layer: the layer that the site belongs to.
        adapter: adapter of that layer.
        inputs: the keyword arguments of that layer, for the tokens before the first stage: positions, mask, cache.
    """

    hidden_states: Tensor
    state: TokenState
    trace: Trace
    flow: Flow
    stage: int
    layer: nn.Module
    adapter: LayerView
    inputs: Mapping[str, Any] = field(default_factory=dict)
