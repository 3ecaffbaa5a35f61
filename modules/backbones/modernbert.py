"""Adapters for ModernBERT."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tokens.flow import Flow
from ..tokens.pooling import mean_of_tokens
from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .text_encoder import TextEncoder, TextEncoderLayers


class ModernBertLayers(TextEncoderLayers):
    """Layers with separate rotary positions per layer type. Local layers attend to near tokens only, with distances measured in the
    original text.
    """

    no_keys = "a modernbert computes keys in one projection with queries and values"
    no_cls_query = "the rotary positions and the window of a modernbert layer are not known before the layer runs"

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts: Any = layer
        attended, _ = parts.attn(parts.attn_norm(hidden_states), attention_mask=attention_mask, **kwargs)
        out: Tensor = hidden_states + attended
        return out

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        parts: Any = layer
        out: Tensor = hidden_states + parts.mlp(parts.mlp_norm(hidden_states))
        return out


class ModernBert(TextEncoder):
    """ModernBERT models. A classifier reads [CLS] or the mean over all tokens."""

    model_type = "modernbert"
    layer_adapter = ModernBertLayers
    classes: ClassVar[tuple[str, ...]] = (
        "ModernBertModel",
        "ModernBertForSequenceClassification",
        "ModernBertForMaskedLM",
        "ModernBertForTokenClassification",
    )
    dense_heads = ("ModernBertForMaskedLM", "ModernBertForTokenClassification")

    @classmethod
    def windows(cls, config: Any) -> tuple[int | None, ...]:
        # The window counts tokens on each side, plus the token itself.
        return tuple(None if window is None else 2 * window + 1 for window in super().windows(config))

    @classmethod
    def head_counts_places(cls, model: PreTrainedModel) -> bool:
        return bool(model.config.classifier_pooling == "mean")

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        flow, hidden_states = trace.flow(), getattr(outputs, "last_hidden_state", None)
        state = flow.state
        if not cls.head_counts_places(model) or not flow.under_head or state is None or hidden_states is None or _as_it_came(state, flow):
            return outputs
        # The head averages over all positions in its mask. With the mean of the kept tokens at each position, it computes that mean.
        outputs.last_hidden_state = mean_of_tokens(hidden_states, state).expand(-1, state.source.shape[1], -1)
        return outputs


def _as_it_came(state: TokenState, flow: Flow) -> bool:
    """True if no token was removed from any row."""
    if state.tokens < state.source.shape[1]:
        return False
    return state.valid is None or (flow.valid is not None and torch.equal(state.valid, flow.valid))
