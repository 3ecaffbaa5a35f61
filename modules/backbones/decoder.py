"""Base classes of the adapters for causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import BYPASS
from ..decoding.cache import LayerEntry, LayerView, RoutedCache, routed_cache
from ..site import TokenSpec
from ..tokens.gather import take
from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .stack import Stack
from .text import TextLayers, TextModel, with_padding


class DecoderLayers(TextLayers):
    """Causal layers: a token attends to itself and to earlier tokens. The layers apply positions to queries and keys.

    A layer that processes a part of the tokens gets their positions, cosines and sines, the matching rows and columns of its mask, and a
    view of the cache that knows the token of each key.

    Attributes:
        cache_name: name of the argument in which layers receive the cache.
    """

    sites = ("before", *BYPASS)
    scopes = ("all", "prompt")
    causal = True
    cache_name: ClassVar[str] = "past_key_values"

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        return 0

    @classmethod
    def begin_layer(cls, layer: nn.Module, state: TokenState, inputs: dict[str, Any]) -> dict[str, Any]:
        cache = inputs.get(cls.cache_name)
        if not isinstance(cache, RoutedCache):
            return inputs
        of: Any = layer
        return inputs | {cls.cache_name: cache.layers[of.plan.index].begin_forward(*state.source.shape)}

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        own, entry, view = dict(inputs), inputs.get(cls.cache_name), None
        if isinstance(entry, LayerEntry):
            every = state.whole and state.batch_rows is None
            view = entry.everything(state.position) if every else entry.chosen(state.position, state.valid, state.batch_rows)
            own[cls.cache_name] = view
        if state.batch_rows is not None:
            own |= cls.select_row_inputs(inputs, state.batch_rows)
        if not state.whole:
            own |= cls.gather_inputs(own, state.position)
        before = entry.before if isinstance(entry, LayerEntry) else 0
        own["attention_mask"] = cls.causal_mask(own.get("attention_mask"), state, view, before, dtype)
        return own

    @classmethod
    def causal_mask(cls, mask: Tensor | None, state: TokenState, view: LayerView | None, before: int, dtype: torch.dtype) -> Tensor | None:
        """The attention mask of a layer for the tokens that it processes.

        Args:
            mask: (B, 1, N, S) mask that the model made for all N tokens of the forward and all S tokens seen, bool or additive; None if
                every earlier token is visible.
            state: TokenState of the M tokens to process.
            view: view of the layer's cache; None without a cache.
            before: number of tokens seen before this forward.
            dtype: dtype of an additive mask.

        Returns:
            (B, 1, M, keys), or None if SDPA's own causal mask is correct.
        """
        bias = state.logit_bias
        if bias is not None and view is not None:
            raise ValueError("a cache cannot hold tokens whose keys have a bias: call the model with use_cache=False")
        alike = view is None or view.slots is None
        if mask is None and bias is None and alike and (state.whole or before == 0):
            # Padding follows the real tokens of its row, so no real token attends to it.
            return None
        if mask is None and bias is None and view is not None and state.tokens == 1 and state.valid is None:
            # The newest token of each row attends to all stored keys.
            return None if view.even or view.slots is None else (view.slots >= 0)[:, None, None]
        if state.whole and alike and bias is None:
            return mask if mask is None or view is None else mask[..., view.start :]
        slots = state.position if view is None or view.slots is None else view.slots
        if mask is None:
            visible = slots[:, None] <= state.position[:, :, None] + before
        else:
            mask = mask.expand(state.rows, -1, -1, -1)[:, 0]
            mask = mask if state.whole else take(mask, state.position)
            visible = mask.gather(2, slots.clamp(min=0)[:, None].expand(-1, state.tokens, -1))
        real = slots >= 0 if view is not None else state.valid
        padding = None if state.valid is None else ~state.valid[:, :, None]
        return with_padding(visible, real, padding, bias, dtype)[:, None]


class Decoder(TextModel):
    """A model that predicts the next token at every token.

    Attributes:
        mask_inputs: names of the inputs of a forward that say which tokens see which.
    """

    mask_inputs: ClassVar[tuple[str, ...]] = ("attention_mask", "position_ids", "past_key_values")

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        return TokenSpec(hidden_size=stack.config.hidden_size, classes=stack.config.vocab_size, family=cls.model_type, causal=True)

    @classmethod
    def reads_every_token(cls, model: PreTrainedModel) -> bool:
        return True

    @classmethod
    def added_inputs(cls, model: PreTrainedModel, trace: Trace | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        requested, given = inputs.get("use_cache"), inputs.get("past_key_values")
        recomputed = model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in cls.layers(model))
        if recomputed and (requested or given is not None):
            # As in transformers' layers: a layer that runs again in backward would store its keys twice.
            if given is not None and given.get_seq_length():
                raise ValueError("past_key_values with tokens, in training with gradient checkpointing: leave one of them out")
            return {"use_cache": False, "past_key_values": None}
        if requested is None and given is None:
            # No cache in training: it is unused, and transformers disables packed-document masking when one is given.
            settings: Any = cls.stack_config(model.config)
            requested = bool(settings.use_cache) and not model.training and _documents(trace, inputs) is None
        if not requested and given is None:
            return {"use_cache": False}
        return {"use_cache": True if requested is None else requested, "past_key_values": routed_cache(model.config, given)}

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        super().bind_inputs(model, trace, inputs)
        flow, tokens = trace.flow(cls.stack_name), inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        assert isinstance(tokens, Tensor)
        number = tokens.shape[1]
        flow.documents, flow.special = _documents(trace, inputs), _special(cls.stack_config(model.config), inputs.get("input_ids"))
        flow.causal_only = flow.documents is None and cls._causal_only(model, number, inputs)
        if number == 1 and flow.special is not None and not bool(flow.special.any()):
            # One question to the device for a step of generation, instead of work in each layer that has to allow for such tokens.
            flow.special = None
        mask = inputs.get("attention_mask")
        if flow.documents is not None:
            flow.valid = None if bool((flow.documents >= 0).all()) else flow.documents >= 0
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            # A mask that hides nothing, as ``generate`` gives one, is none: numbers of tokens stay known on the host.
            mask = None if bool(mask.all()) else mask
            real = None if mask is None else mask[:, -number:].bool()
            flow.valid = None if real is None or bool(real.all()) else real
        elif isinstance(mask, Tensor):
            seen = cls.layers_adapter(model.config).valid_tokens(mask)
            flow.valid = None if seen is None or bool(seen[:, -number:].all()) else seen[:, -number:]
        cache = inputs.get("past_key_values")
        flow.seen, flow.carry = (cache.get_seq_length(), cache.carry) if isinstance(cache, RoutedCache) else (0, None)
        flow.earlier = flow.seen
        if flow.seen and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == flow.seen + number:
            flow.earlier = mask[:, : flow.seen].sum(-1)

    @classmethod
    def _causal_only(cls, model: PreTrainedModel, number: int, inputs: Mapping[str, Any]) -> bool:
        """Whether no earlier token of a row of ``number`` tokens is hidden by padding, packing, a cache or a window, and a graph is compiled.

        Without a graph transformers makes no mask then. Exported graphs serve rows of one token too, for which SDPA's own mask is another.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        settings: Any = cls.stack_config(model.config)
        window = getattr(settings, "sliding_window", None)
        plain = settings._attn_implementation == "sdpa" and (window is None or window > number)
        return plain and all(inputs.get(name) is None for name in cls.mask_inputs)


def _special(config: Any, ids: Any) -> Tensor | None:
    """(B, N) bool: the tokens that begin or end a text, chat turns included, by a config."""
    named = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    numbers = {number for given in named for number in (given if isinstance(given, list | tuple) else [given]) if number is not None}
    if not numbers or not isinstance(ids, Tensor):
        return None
    # Without a tensor of the numbers, whose copy to the device the host would wait for.
    found = torch.zeros_like(ids, dtype=torch.bool)
    for number in numbers:
        found = found | (ids == number)
    return found


def _documents(trace: Trace | None, inputs: Mapping[str, Any]) -> Tensor | None:
    """(B, N) document of each token in packed rows: from the trace, or from ``position_ids`` that restart, by transformers' rule."""
    if trace is not None and trace.documents is not None:
        return trace.documents
    position = inputs.get("position_ids")
    if position is None or position.ndim != 2 or inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return None
    documents = (position.diff(dim=1, prepend=position[:, :1] - 1) != 1).cumsum(-1)
    rows = inputs.get("input_ids")
    rows = inputs.get("inputs_embeds") if rows is None else rows
    documents = documents.expand(rows.shape[0], -1) if isinstance(rows, Tensor) else documents
    return None if bool((documents[:, -1] == 0).all()) else documents
