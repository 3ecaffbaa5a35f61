"""ModernBERT of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tokens.flow import Flow
from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .text_encoder import TextEncoder, TextEncoderLayers


class ModernBertLayers(TextEncoderLayers):
    """Rotary positions of a kind for each type of layer, and layers that look at near tokens alone; near is counted in the text, not in
    what is left of it.
    """

    no_keys = "keys come out of one projection with queries and values in a modernbert"
    no_cls_query = "how the layer that follows rotates and how far it looks is not known before it runs in a modernbert"

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
    """A classifier reads [CLS] or the mean over all tokens."""

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
        # As many to the left as to the right, and the token itself.
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
        # The head averages over all places that its mask calls text: what is left of a row, at each of them, leaves that mean unmoved.
        weight = state.size if state.proportional else torch.ones_like(state.size)
        weight = (weight if state.valid is None else weight * state.valid).unsqueeze(-1)
        mean = (hidden_states.float() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        outputs.last_hidden_state = mean.to(hidden_states.dtype).expand(-1, state.source.shape[1], -1)
        return outputs


def _as_it_came(state: TokenState, flow: Flow) -> bool:
    """Every row has as many tokens as it came with."""
    if state.tokens < state.source.shape[1]:
        return False
    return state.valid is None or (flow.valid is not None and torch.equal(state.valid, flow.valid))
