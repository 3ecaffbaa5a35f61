"""Adapters for BEiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .vision import VisionLayers, VisionModel


class BeitLayers(VisionLayers):
    """ViT layers with layer scale and relative positions, which are a bias on every attention map, per layer or shared by all layers.

    A BEiT layer computes its bias for the full grid inside its forward. Under compression the adapter computes it instead, gathers the
    rows and columns of the current tokens, and passes it to the layer as its mask.
    """

    masks_in_layers = True

    @classmethod
    def packs(cls, config: PretrainedConfig) -> bool:
        return False

    @classmethod
    def patch_layer(cls, layer: nn.Module) -> None:
        if layer.relative_position_bias is not None:
            # An instance attribute overrides the class's forward. The module, its parameters and their names are unchanged.
            layer.relative_position_bias.__dict__["forward"] = _nothing

    @classmethod
    def unpatch_layer(cls, layer: nn.Module) -> None:
        if layer.relative_position_bias is not None:
            del layer.relative_position_bias.__dict__["forward"]

    @staticmethod
    def valid_tokens(attention_mask: Tensor | None) -> Tensor | None:
        return None if _is_shared_bias(attention_mask) else VisionLayers.valid_tokens(attention_mask)

    @classmethod
    def layer_mask(
        cls, layer: nn.Module, attention_mask: Tensor | None, state: TokenState, dtype: torch.dtype, **kwargs: Any
    ) -> Tensor | None:
        bias = attention_mask if _is_shared_bias(attention_mask) else None
        mask = cls.gather_mask(None if bias is not None else attention_mask, state, dtype)
        own: Any = layer.relative_position_bias
        if own is not None:
            (height, width), patch, tokens = kwargs["resolution"], cast(int, layer.patch_size), state.source.shape[1]
            window, stretch = (height // patch, width // patch), kwargs.get("interpolate_pos_encoding", False)
            of_layer = type(own).forward(own, window, stretch, dim_size=tokens)
            bias = of_layer if bias is None else bias + of_layer
        if bias is None:
            return mask
        if state.tokens < state.source.shape[1]:
            bias = _between_positions(bias, state.position)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        return bias + mask

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        # Arguments for the bias, which attention does not accept.
        rest = {key: value for key, value in kwargs.items() if key not in ("interpolate_pos_encoding", "resolution")}
        attended, _ = parts.attention(parts.layernorm_before(hidden_states), attention_mask=attention_mask, **rest)
        out: Tensor = parts.drop_path(parts.lambda_1 * parts.dropout(attended)) + hidden_states
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = parts.drop_path(parts.lambda_2 * parts.dropout(parts.mlp(parts.layernorm_after(hidden_states)))) + hidden_states
        return out


class Beit(VisionModel):
    """BEiT models, with one CLS token at the start. The classifier averages the patches."""

    model_type = "beit"
    layer_adapter = BeitLayers
    classes: ClassVar[tuple[str, ...]] = ("BeitModel", "BeitForImageClassification")
    refused: ClassVar[dict[str, str]] = {
        "BeitForSemanticSegmentation": "its head reads the hidden states of several layers, which have different tokens under compression; "
        "take ViTForSemanticSegmentation or Dinov2ForSemanticSegmentation of laconic.modules.heads.vit and .dinov2"
    }
    averages = True
    interpolates = False

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        if model.config.use_shared_relative_position_bias and inputs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask cannot be given to a BEiT with use_shared_relative_position_bias: transformers adds the bias to a boolean "
                "mask, which then masks nothing. Give images of one size in a batch, and leave attention_mask out"
            )

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        flow, pooler = trace.flow(), getattr(model, "pooler", None)
        outputs, state = super().finish(model, outputs, trace), flow.state
        if state is not None and pooler is not None and (state.valid is not None or (state.proportional and flow.under_head)):
            # The model's pooler ran before padding was filled with the mean and sizes were applied; it has no norm, so it is run again.
            outputs.pooler_output = pooler(outputs.last_hidden_state)
        return outputs


def _nothing(*args: Any, **kwargs: Any) -> float:
    """Replaces a layer's own bias with 0."""
    return 0.0


def _is_shared_bias(attention_mask: Tensor | None) -> bool:
    """True if the mask contains a shared bias, which BEiT passes to its layers as a mask with a map per head, (1, H, N, N)."""
    return attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] > 1


def _between_positions(bias: Tensor, position: Tensor) -> Tensor:
    """(1, H, N, N) bias and (B, M) positions -> (B, H, M, M)."""
    (rows, tokens), originals = position.shape, bias.shape[-1]
    pairs = position.unsqueeze(-1) * originals + position.unsqueeze(-2)
    return bias[0].flatten(1)[:, pairs.flatten(1)].transpose(0, 1).reshape(rows, -1, tokens, tokens)
