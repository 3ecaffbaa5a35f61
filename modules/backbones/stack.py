"""Stack: a sequence of layers to which stages can be added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from .layer_adapter import LayerAdapter


@dataclass(frozen=True)
class Stack:
    """A sequence of layers of one family, with its configuration.

    Attributes:
        name: "" in a model with one stack; ``vision``, ``projector`` or ``text`` in a composite model.
        layers: the layers, in order.
        adapter: adapter of the layers.
        config: configuration of the layers: the model's, or that of the sub-model that contains them.
        whole_until: transformers reads the output of so many of the first layers at every place of a row, so that tokens that an earlier
            stack removed have a place there, which no layer processes.
        visual: rows hold tokens of images or video among text; stages may touch these alone.
    """

    name: str
    layers: nn.ModuleList
    adapter: type[LayerAdapter]
    config: PretrainedConfig
    visual: bool = False
    whole_until: int = 0

    @property
    def scopes(self) -> tuple[str, ...]:
        """Scopes that a stage of the stack may have."""
        return ("visual",) if self.visual else self.adapter.scopes

    @property
    def attention(self) -> str:
        """Name of the layers' attention implementation."""
        return str(self.config._attn_implementation)


def sharded(layer: nn.Module) -> bool:
    """True if the layer's weights are sharded (ZeRO-3): all ranks must then run the layer, since they gather its weights together."""
    # Either all parameters of a model are sharded or none.
    return hasattr(next(layer.parameters(), None), "ds_id")
