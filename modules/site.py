"""The words that scorers, selectors, mergers and estimators share: what a part is built for, and what it may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .tokens.flow import Flow
from .tokens.state import TokenState
from .tokens.trace import Trace


@dataclass(frozen=True)
class TokenSpec:
    """What a part is built for.

    Attributes:
        hidden_size: width C of the tokens.
        classes: number of labels of the task.
        patch_values: pixels times channels of the patch that a token comes from; 0 where tokens are no patches.
        has_cls: the first token is one that the task's head reads.
        family: the family's name for messages.
        causal: the model's output at a token may depend on no later token.
    """

    hidden_size: int
    classes: int
    patch_values: int = 0
    has_cls: bool = False
    family: str = "this backbone"
    causal: bool = False


class LayerView(Protocol):
    """What a layer's adapter offers to parts."""

    def keys(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """(B, H, M, D) keys that the layer's attention computes from its (B, M, C) input, its norm applied first."""

    def cls_query_and_keys(self, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        """Query of the first token (B, H, 1, D), keys of all (B, H, M, D) and the attention's scale, for this layer."""


@dataclass(frozen=True)
class SiteInput:
    """What a part may look at.

    Attributes:
        hidden_states: (B, M, C) the tokens at the site.
        state: where they came from.
        trace: the forward they belong to.
        flow: of the stack that the layer is of.
        stage: index of the stage among the model's stages.
        layer: the layer that the site belongs to.
        adapter: of the layer.
    """

    hidden_states: Tensor
    state: TokenState
    trace: Trace
    flow: Flow
    stage: int
    layer: nn.Module
    adapter: LayerView
