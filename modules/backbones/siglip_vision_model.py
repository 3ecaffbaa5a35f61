"""Adapters for the vision tower of SigLIP, alone and with a classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..cost.shape import StackShape
from ..tokens.trace import Trace
from .clip_vision_model import ClipVision, ClipVisionLayers


class SiglipVisionLayers(ClipVisionLayers):
    """CLIP layers without a CLS token; no token is protected."""

    has_cls = False


class SiglipVision(ClipVision):
    """SigLIP vision towers. A learned probe pools all tokens by attention; a classifier averages them."""

    model_type = "siglip_vision_model"
    layer_adapter = SiglipVisionLayers
    classes: ClassVar[tuple[str, ...]] = ("SiglipVisionModel",)

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        shape, tower = super().shapes(model, size)[""], cls.base(model)
        if not tower.use_head:
            return {"": shape}
        # The probe is one query; every token gives a key and a value. A classifier runs this pooling head too, without using it.
        width = shape.hidden
        return {"": replace(shape, head_macs=shape.head_macs + width**2, head_macs_per_token=2 * width**2 + 2 * width)}

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        outputs = super().finish(model, outputs, trace)
        flow, head = trace.flow(), getattr(model, "head", None)
        state = flow.state
        if state is None or head is None or (state.valid is None and not state.proportional) or flow.under_head:
            return outputs
        # The model's own call of the head attended to padding, and ignored the sizes of merged tokens.
        hidden_states = outputs.last_hidden_state
        probe = head.probe.repeat(hidden_states.shape[0], 1, 1)
        bias = torch.zeros_like(state.size) if state.logit_bias is None else state.logit_bias
        if state.valid is not None:
            bias = bias.masked_fill(~state.valid, torch.finfo(hidden_states.dtype).min)
        pooled = head.attention(probe, hidden_states, hidden_states, key_padding_mask=bias.to(hidden_states.dtype))[0]
        outputs.pooler_output = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
        return outputs


class Siglip(SiglipVision):
    """A SigLIP vision tower with a classifier."""

    model_type = "siglip"
    classes: ClassVar[tuple[str, ...]] = ("SiglipForImageClassification",)
    refused: ClassVar[dict[str, str]] = {
        "SiglipModel": "it holds a text model beside the vision tower: compress model.vision_model, or load SiglipVisionModel"
    }
