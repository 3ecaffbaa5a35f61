"""What causal language models share; no adapter by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..decoding.cache import LayerEntry, LayerView, RoutedCache
from ..decoding.generation import routed_cache
from ..scorers.base import TokenSpec
from ..sites import BYPASS
from ..tokens.gather import take
from ..tokens.state import TokenState
from ..tokens.trace import Trace
from .causal_shrinking import check_shrinking
from .text import TextBackbone, with_filler

if TYPE_CHECKING:
    from ..config import CompressionConfig, RestoreConfig
    from ..stage import Stage


class DecoderBackbone(TextBackbone):
    """A token sees itself and earlier ones; positions are turned into keys and queries inside the layers, from what the model hands
    them.

    A layer that processes a part of the tokens is handed their positions, cosines and sines, the rows and columns of its mask, and
    a view of the cache that knows which tokens the keys belong to.

    Attributes:
        cache_name: under which the models hand their layers the cache.
    """

    sites = ("before", *BYPASS)
    causal = True
    cache_name: ClassVar[str] = "past_key_values"

    @classmethod
    def prefix(cls, config: PretrainedConfig) -> int:
        return 0

    @classmethod
    def token_spec(cls, config: PretrainedConfig) -> TokenSpec:
        return TokenSpec(hidden_size=config.hidden_size, classes=config.vocab_size, family=cls.model_type, causal=True)

    @classmethod
    def reads_every_token(cls, model: PreTrainedModel) -> bool:
        return True

    @classmethod
    def parallel(cls, config: PretrainedConfig) -> bool:
        """Attention and MLP of a layer read the same input, so that it has no halves."""
        return False

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attention {implementation!r} is not served in a causal model with stages: load it with attn_implementation 'sdpa' or 'eager'"
            )
        for stage in config.stages:
            if stage.site not in ("before", "around") and cls.parallel(model.config):
                raise ValueError(
                    f"stage {stage.key!r}: site = {stage.site!r} is not offered: the layers of this {cls.model_type} compute attention and "
                    "MLP side by side (use_parallel_residual); take 'around'"
                )

    @classmethod
    def check_shrinking(cls, stages: Sequence[Stage], restore: RestoreConfig | None, layers: int) -> None:
        check_shrinking(stages, restore, layers)

    @classmethod
    def added_inputs(cls, model: PreTrainedModel, trace: Trace | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        wanted, given = inputs.get("use_cache"), inputs.get("past_key_values")
        if wanted is None and given is None:
            # In training nobody reads it, and transformers does not look for packed documents where there is a cache.
            wanted = bool(model.config.use_cache) and not model.training and _documents(trace, inputs) is None
        if not wanted and given is None:
            return {"use_cache": False}
        return {"use_cache": True if wanted is None else wanted, "past_key_values": routed_cache(model.config, given)}

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        assert isinstance(tokens, Tensor)
        number = tokens.shape[1]
        trace.documents = _documents(trace, inputs)
        mask = inputs.get("attention_mask")
        if trace.documents is not None:
            trace.valid = None if bool((trace.documents >= 0).all()) else trace.documents >= 0
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -number:].bool()
            trace.valid = None if bool(real.all()) else real
        elif isinstance(mask, Tensor):
            seen = cls.valid_tokens(mask)
            trace.valid = None if seen is None or bool(seen[:, -number:].all()) else seen[:, -number:]
        cache = inputs.get("past_key_values")
        trace.seen, trace.carry = (cache.get_seq_length(), cache.carry) if isinstance(cache, RoutedCache) else (0, None)
        if trace.labels is None and isinstance(inputs.get("labels"), Tensor):
            trace.labels = inputs["labels"]

    @classmethod
    def begin(cls, trace: Trace, hidden_states: Tensor, attention_mask: Tensor | None) -> TokenState:
        rows, tokens, _ = hidden_states.shape
        documents = None if trace.documents is None else trace.documents.clamp(min=0)
        return TokenState.initial(rows, tokens, trace.prefix, trace.valid, hidden_states.device, documents)

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
        """What the attention of a layer needs as its mask for the tokens that it processes.

        Args:
            mask: (B, 1, N, S) what the model made for all tokens of the forward and all that were seen, bool or additive; None means
                that everything earlier is visible.
            state: the M tokens to process.
            view: of the cache; None without one.
            before: tokens seen before this forward.
            dtype: of an additive mask.

        Returns:
            (B, 1, M, keys), or None where it is causal as SDPA understands it by itself.
        """
        bias = state.logit_bias
        if bias is not None and view is not None:
            raise ValueError("a cache cannot hold tokens whose keys have a bias: call the model with use_cache=False")
        alike = view is None or view.slots is None
        if mask is None and bias is None and alike and (state.whole or before == 0):
            # Filler lies behind the real tokens of its row, so that none of them sees it.
            return None
        if mask is None and bias is None and view is not None and state.tokens == 1 and state.valid is None:
            # The newest token of each row sees all that is stored.
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
        filler = None if state.valid is None else ~state.valid[:, :, None]
        return with_filler(visible, real, filler, bias, dtype)[:, None]


def _documents(trace: Trace | None, inputs: Mapping[str, Any]) -> Tensor | None:
    """(B, N) documents of packed rows: the caller's, or where ``position_ids`` start again, as transformers sees it too."""
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
