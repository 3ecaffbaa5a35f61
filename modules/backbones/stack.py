"""Stack: a run of layers that stages sit in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from .layer_adapter import LayerAdapter


@dataclass(frozen=True)
class Stack:
    """A run of layers of one family, with its own configuration.

    Attributes:
        name: "" in a model that has one; ``vision``, ``projector``, ``text`` in one of several parts.
        layers: in order.
        adapter: of the layers.
        config: of the layers; that of the model, or of the part that they belong to.
    """

    name: str
    layers: nn.ModuleList
    adapter: type[LayerAdapter]
    config: PretrainedConfig

    @property
    def attention(self) -> str:
        """Name of the attention implementation that the layers run."""
        return str(self.config._attn_implementation)
