"""Adapters for the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as one packed row, and a merger of squares of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from ..config import SITES
from ..tokens.gather import take
from ..tokens.state import TokenState
from ..tokens.units import Units
from .layer_adapter import LayerAdapter
from .projector import JoiningProjector

_NO_MASK = "layers of this tower take no mask"
_NO_KEYS = "the adapter of this tower computes none"


class QwenVisionLayers(LayerAdapter):
    """Pre-norm layers with rotary positions. A row is an image, or a frame of a video, padded to the longest.

    A layer gets the tokens of all rows in one packed row, with the ends of the rows, or of their windows, and the rotary positions of the tokens
    that are left.
    """

    sites = SITES
    padding_on_flow = True
    positional = ()
    no_key_bias = _NO_MASK
    no_keys = _NO_KEYS
    no_cls_query = _NO_KEYS

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 0

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            inputs: ``position_embeddings``, cosines and sines (B, N, D) of the original tokens, and ``windows`` (B, N) int64, the window of each,
                ascending over all rows; None if tokens attend to their whole row.
        """
        slots = packed_slots(state.valid)
        # Rows one after the other, or the windows of all rows.
        segment = torch.arange(state.rows, device=state.position.device)[:, None].expand_as(state.position)
        if inputs["windows"] is not None:
            segment = inputs["windows"].gather(1, state.position)
        lengths = torch.unique_consecutive(pack(segment.unsqueeze(-1), slots), return_counts=True, dim=0)[1]
        return {
            "slots": slots,
            "cu_seqlens": functional.pad(lengths.cumsum(0), (1, 0)).int(),
            "position_embeddings": tuple(pack(take(part, state.position), slots) for part in inputs["position_embeddings"]),
        }

    @classmethod
    def call(cls, forward: Callable[..., Any], hidden_states: Tensor, inputs: Mapping[str, Any]) -> Any:
        slots, given = inputs["slots"], {name: value for name, value in inputs.items() if name != "slots"}
        return unpack(forward(pack(hidden_states, slots), **given), slots, *hidden_states.shape[:2])

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        parts: Any = layer

        def half(tokens: Tensor, **given: Any) -> Any:
            return tokens + parts.attn(parts.norm1(tokens), **given)

        out: Tensor = cls.call(half, hidden_states, kwargs)
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = hidden_states + parts.mlp(parts.norm2(hidden_states))
        return out


class QwenMerger(JoiningProjector):
    """The merger behind these towers, which takes the patches of all squares as one packed row."""

    @classmethod
    def call(cls, forward: Callable[..., Any], hidden_states: Tensor, inputs: Mapping[str, Any]) -> Any:
        units: Units = inputs["units"]
        valid = units.state.valid
        tokens = pack(take(hidden_states, units.order), packed_slots(None if valid is None else valid.repeat_interleave(units.size, 1)))
        return unpack(forward(tokens), packed_slots(valid), *units.number.shape)


def packed_slots(valid: Tensor | None) -> Tensor | None:
    """(T,) int64, flat slots of the real tokens of (B, M) rows; None if all are real."""
    return None if valid is None else valid.flatten().nonzero().squeeze(-1)


def pack(rows: Tensor, slots: Tensor | None) -> Tensor:
    """(B, M, C) -> (T, C)."""
    return rows.flatten(0, 1) if slots is None else rows.flatten(0, 1).index_select(0, slots)


def unpack(packed: Tensor, slots: Tensor | None, rows: int, tokens: int) -> Tensor:
    """(T, C) -> (B, M, C), zeros in padding."""
    if slots is not None:
        packed = packed.new_zeros(rows * tokens, packed.shape[-1]).index_copy(0, slots, packed)
    return packed.view(rows, tokens, -1)
