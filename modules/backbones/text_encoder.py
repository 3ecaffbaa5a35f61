"""Base classes of the adapters for text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import SITES
from ..site import TokenSpec
from ..tokens.gather import take
from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .stack import Stack
from .text import TextLayers, TextModel, with_padding


class TextEncoderLayers(TextLayers):
    """Layers in which a token attends to all tokens, or to near ones. The first token, [CLS], is protected even if no head reads it:
    trained layers direct unused attention to it.
    """

    sites = SITES

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 1

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        own = dict(inputs)
        if not state.whole:
            own |= cls.gather_inputs(inputs, state.position)
        own["attention_mask"] = cls.layer_mask(layer, inputs.get("attention_mask"), state, dtype)
        return own

    @classmethod
    def layer_mask(
        cls, layer: nn.Module, attention_mask: Tensor | None, state: TokenState, dtype: torch.dtype, **kwargs: Any
    ) -> Tensor | None:
        bias = state.logit_bias
        if state.whole and bias is None:
            return attention_mask
        if attention_mask is None or getattr(layer, "attention_type", "full_attention") == "full_attention":
            # The model's mask and the state both mask only padding.
            return cls.gather_mask(None, state, dtype)
        position, mask = state.position, attention_mask.expand(state.rows, -1, -1, -1)[:, 0]
        visible = take(mask, position).gather(2, position[:, None].expand(-1, state.tokens, -1))
        padding = None if state.valid is None else ~state.valid[:, :, None]
        return with_padding(visible, state.valid, padding, bias, dtype)[:, None]


class TextEncoder(TextModel):
    """An encoder and its heads. The two-dimensional ``attention_mask`` marks padding, which follows the text.

    Attributes:
        dense_heads: names of model classes whose head reads every token, so that shrinking needs a restore.
    """

    dense_heads: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def default_tokens(cls, config: Any) -> int:
        return int(min(super().default_tokens(config), config.max_position_embeddings))

    @classmethod
    def reads_every_token(cls, model: PreTrainedModel) -> bool:
        # A compressed model's class derives from the listed class.
        return any(kind.__name__ in cls.dense_heads for kind in type(model).__mro__)

    @classmethod
    def every_token(cls, model: PreTrainedModel, stack: Stack) -> str | None:
        return f"the head of {type(model).__name__} reads every token" if cls.reads_every_token(model) else None

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        return TokenSpec(hidden_size=model.config.hidden_size, classes=model.config.num_labels or 0, has_cls=True, family=cls.model_type)

    @classmethod
    def labels(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
        # Labels per token are not labels of the row.
        return None if cls.reads_every_token(model) else super().labels(model, inputs)

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        mask, flow = inputs.get("attention_mask"), trace.flow()
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask of {kind}: a {cls.model_type} with stages takes (batch, tokens), 1 for text and 0 for padding"
            )
        real = mask.bool()
        if bool(real.all()):
            flow.valid = None
            return
        flow.valid = real
        if not bool(real[:, 0].all()):
            raise ValueError(
                "attention_mask hides the first token of a row, which is [CLS] and protected: pad behind the text "
                "(tokenizer.padding_side = 'right')"
            )
