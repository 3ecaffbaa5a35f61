"""Base classes of the adapters for text models, causal models and encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..cost.shape import StackShape
from ..tokens.gather import take_shared
from .layer_adapter import LayerAdapter
from .model_adapter import ModelAdapter

# Default number of tokens per row.
_TOKENS = 1024


class TextLayers(LayerAdapter):
    """Layers over rows of text tokens, which may receive positions from the model and may use a sliding window."""

    attentions = ("sdpa", "eager")
    padding_on_flow = True

    @classmethod
    def gather_inputs(cls, inputs: Mapping[str, Any], position: Tensor) -> dict[str, Any]:
        """The per-token keyword arguments of a layer, gathered at (B, K) positions."""
        picked: dict[str, Any] = {}
        if isinstance(inputs.get("position_ids"), Tensor):
            picked["position_ids"] = inputs["position_ids"].expand(len(position), -1).gather(1, position)
        if inputs.get("position_embeddings") is not None:
            # RoPE of the original positions; tokens are not renumbered.
            picked["position_embeddings"] = tuple(take_shared(part, position) for part in inputs["position_embeddings"])
        return picked

    @classmethod
    def select_row_inputs(cls, inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """The per-row keyword arguments of a layer for (R,) rows; tensors shared by all rows are unchanged."""

        def of(part: Tensor) -> Tensor:
            return part if part.shape[0] == 1 else part.index_select(0, rows)

        picked: dict[str, Any] = {
            name: of(inputs[name]) for name in ("position_ids", "attention_mask") if isinstance(inputs.get(name), Tensor)
        }
        if inputs.get("position_embeddings") is not None:
            picked["position_embeddings"] = tuple(of(part) for part in inputs["position_embeddings"])
        return picked

    @classmethod
    def slice_inputs(cls, inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        first = dict(inputs)
        if isinstance(first.get("position_ids"), Tensor):
            first["position_ids"] = first["position_ids"][:, :tokens]
        if first.get("position_embeddings") is not None:
            first["position_embeddings"] = tuple(part[:, :tokens] for part in first["position_embeddings"])
        if isinstance(first.get("attention_mask"), Tensor):
            first["attention_mask"] = first["attention_mask"][..., :tokens, :tokens]
        return first


class TextModel(ModelAdapter):
    """A model with ``input_ids`` and one stack of layers."""

    @classmethod
    def reads_every_token(cls, model: PreTrainedModel) -> bool:
        """True if the head runs on every token that leaves the layers; False if it runs on one token."""
        raise NotImplementedError

    @classmethod
    def default_tokens(cls, config: Any) -> int:
        """Default number of tokens per row."""
        return _TOKENS

    @classmethod
    def gated(cls, config: PretrainedConfig) -> bool:
        """True if the MLP has a gate: three matrices instead of two."""
        return True

    @classmethod
    def windows(cls, config: Any) -> tuple[int | None, ...]:
        """Attention window of each layer in tokens; None for full attention."""
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        assert not isinstance(size, tuple)
        config: Any = model.config
        layers = {id(module) for module in cls.layers(model).modules()}
        outside = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in layers]
        head_macs, every = sum(module.in_features * module.out_features for module in outside), cls.reads_every_token(model)
        protected = cls.layer_adapter.leading(config)
        shape = cls.layers_shape(config, protected, (size or cls.default_tokens(config)) - protected)
        return {"": replace(shape, head_macs=0 if every else head_macs, head_macs_per_token=head_macs if every else 0)}

    @classmethod
    def layers_shape(cls, config: Any, protected: int, routable: int) -> StackShape:
        """StackShape of the layers alone, for rows of protected and routable tokens."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return StackShape(
            hidden=config.hidden_size,
            intermediate=cls.intermediate(config),
            layers=config.num_hidden_layers,
            heads=heads,
            protected=protected,
            routable=routable,
            embed_macs=0,
            head_macs=0,
            query_width=heads * width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
            gated=cls.gated(config),
            windows=cls.windows(config),
        )

    @classmethod
    def intermediate(cls, config: Any) -> int:
        """Width of the MLP's hidden layer."""
        return int(config.intermediate_size)


def with_padding(visible: Tensor, real: Tensor | None, padding: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, M, S) visible keys of each query, with padding keys masked, padding queries unmasked, and a (B, S) bias added to the keys."""
    lowest = torch.finfo(dtype).min
    if visible.dtype == torch.bool:
        visible = visible if real is None else visible & real[:, None]
        # Fully masked queries give NaN in some kernels, so padding queries may attend anywhere; their output is discarded.
        visible = visible if padding is None else visible | padding
        return visible if bias is None else torch.where(visible, bias[:, None].to(dtype), lowest)
    visible = visible if real is None else visible.masked_fill(~real[:, None], lowest)
    visible = visible if padding is None else visible.masked_fill(padding, 0.0)
    return visible if bias is None else visible + bias[:, None].to(visible.dtype)
