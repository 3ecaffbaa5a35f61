"""LayerAdapter: halves, masks, keys and positions of one family of layers. Adapters are used as classes, without instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..tokens.flow import Flow
from ..tokens.state import TokenState


class LayerAdapter:
    """One family of layers. The same adapter serves such layers inside composite models.

    Attributes:
        sites: sites that the layers offer, a subset of SITES; all but ``before`` and ``around`` use the two halves of a layer.
        scopes: scopes that the layers offer, a subset of SCOPES.
        attentions: attention implementations that work with stages; None means any.
        masks_in_layers: layers add a full-length bias to their mask; under compression ``layer_mask`` adds it for the current tokens.
        padding_on_flow: the model adapter marks padding on the flow; if False, the layers' mask does.
        causal: the output at a token does not depend on later tokens.
        positional: names of the layers' positional arguments, after the hidden states.
        lora_targets: suffixes of the names of linear layers that LoRA adapts by default; None means all linear layers.
        no_keys: reason why ``keys`` cannot be computed; None if it can.
        no_cls_query: reason why ``cls_query_and_keys`` cannot be computed; None if it can.
        no_query: reason why ``query_and_keys`` cannot be computed; None if it can.
        no_key_bias: reason why nothing can be added to the attention logits of keys; None if it can.
        no_padding: reason why rows cannot have different numbers of tokens; None if they can.
    """

    sites: ClassVar[tuple[str, ...]]
    scopes: ClassVar[tuple[str, ...]] = ("all",)
    attentions: ClassVar[tuple[str, ...] | None] = None
    masks_in_layers: ClassVar[bool] = False
    padding_on_flow: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    positional: ClassVar[tuple[str, ...]] = ("attention_mask",)
    lora_targets: ClassVar[tuple[str, ...] | None] = None
    no_keys: ClassVar[str | None] = None
    no_cls_query: ClassVar[str | None] = None
    no_query: ClassVar[str | None] = "this backbone's adapter computes none"
    no_key_bias: ClassVar[str | None] = None
    no_padding: ClassVar[str | None] = None

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        """Number of protected tokens at the start of each row."""
        raise NotImplementedError

    @classmethod
    def refused_sites(cls, config: PretrainedConfig) -> Mapping[str, str]:
        """Sites that layers with this configuration do not offer, with the reason."""
        return {}

    @classmethod
    def packs(cls, config: PretrainedConfig) -> bool:
        """True if rows may be packed: layers pass any mask on to their attention function, and nothing else depends on the row."""
        return False

    @classmethod
    def patch_layer(cls, layer: nn.Module) -> None:
        """Prepares a layer for ``layer_mask``; called on every layer when stages are added."""

    @classmethod
    def unpatch_layer(cls, layer: nn.Module) -> None:
        """Reverts ``patch_layer``; called on every layer when stages are removed."""

    @classmethod
    def begin(cls, flow: Flow, hidden_states: Tensor, attention_mask: Tensor | None) -> TokenState:
        """TokenState before the first stage, from the input and the mask of the first layer."""
        rows, tokens, _ = hidden_states.shape
        valid = flow.valid if cls.padding_on_flow else cls.valid_tokens(attention_mask)
        documents = None if flow.documents is None else flow.documents.clamp(min=0)
        return TokenState.initial(rows, tokens, flow.leading, valid, hidden_states.device, documents)

    @classmethod
    def begin_layer(cls, layer: nn.Module, state: TokenState, inputs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer, prepared once per forward before the layer's stages run."""
        return inputs

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer, or of its attention half, for the current tokens.

        Args:
            layer: the layer that is about to run.
            state: TokenState of the tokens that it will process.
            dtype: dtype of an additive mask.
            inputs: result of ``begin_layer``.
        """
        others = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return others | {"attention_mask": cls.layer_mask(layer, inputs.get("attention_mask"), state, dtype, **others)}

    @classmethod
    def call(cls, forward: Callable[..., Any], hidden_states: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Output of a whole layer.

        Args:
            forward: the layer's own call.
            hidden_states: (B, M, C).
            inputs: result of ``layer_inputs``.
        """
        return forward(hidden_states, **inputs)

    @classmethod
    def slice_inputs(cls, inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A layer's keyword arguments for the first ``tokens`` tokens, by plain slicing; used to measure the oracle speed."""
        return dict(inputs)

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The first half of a layer, residual included; followed by ``mlp_half`` it is bit-equal to the layer's forward.

        Args:
            layer: a layer of the family.
            hidden_states: (B, M, C).
            attention_mask: result of ``layer_mask``.
            kwargs: the layer's other keyword arguments.

        Returns:
            (B, M, C).
        """
        raise NotImplementedError

    @classmethod
    def mlp_half(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """The second half of a layer, (B, M, C) -> (B, M, C), residual included."""
        raise NotImplementedError

    @classmethod
    def keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """(B, H, M, D) keys that the layer's attention computes from its (B, M, C) input, including the norm before attention."""
        raise NotImplementedError

    @classmethod
    def mean_keys(cls, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """(B, M, D) mean of ``keys`` over heads."""
        return cls.keys(layer, hidden_states).mean(1)

    @classmethod
    def cls_query_and_keys(cls, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        """Query of the first token (B, H, 1, D), keys of all tokens (B, H, M, D) and the attention scale of this layer."""
        raise NotImplementedError

    @classmethod
    def query_and_keys(
        cls, layer: nn.Module, hidden_states: Tensor, slot: Tensor, state: TokenState, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, float]:
        """What the layer's attention computes from its input for one query of each row, norm and positions included.

        Args:
            layer: the layer.
            hidden_states: (B, M, C) its input.
            slot: (B, 1) int64, slot of the token whose query is computed.
            state: TokenState of the M tokens.
            inputs: the layer's keyword arguments, for the original tokens.

        Returns:
            (B, H, 1, D) query, (B, G, M, D) keys, of which each serves H / G heads, and the attention scale.
        """
        raise NotImplementedError

    @classmethod
    def layer_mask(
        cls, layer: nn.Module, attention_mask: Tensor | None, state: TokenState, dtype: torch.dtype, **kwargs: Any
    ) -> Tensor | None:
        """All terms that this layer adds to its attention logits, for the current tokens.

        Args:
            layer: the layer that is about to run.
            attention_mask: the mask that the model passed to the layer, over the original tokens.
            state: TokenState of the current tokens.
            dtype: dtype of an additive mask, that of the queries.
            kwargs: the layer's other keyword arguments.
        """
        return cls.gather_mask(attention_mask, state, dtype)

    @staticmethod
    def valid_tokens(attention_mask: Tensor | None) -> Tensor | None:
        """(B, M) bool, real tokens according to the mask that the model made, (B, 1, M, M) bool or additive; None without a mask."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 4:
            raise ValueError(
                f"attention mask of shape {tuple(attention_mask.shape)}: compression supports (batch, 1, queries, keys); "
                "use attn_implementation 'sdpa' or 'eager' for padded batches"
            )
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(attention_mask.dtype).min / 2
        return seen.any(2).any(1)

    @staticmethod
    def gather_mask(attention_mask: Tensor | None, state: TokenState, dtype: torch.dtype) -> Tensor | None:
        """The attention mask for the current tokens.

        Args:
            attention_mask: (B, 1, N, N) mask over the original tokens, bool or additive; None if the model has none.
            state: TokenState of the current tokens.
            dtype: dtype of an additive mask, that of the queries.

        Returns:
            (B, 1, M, M) mask[idx][:, idx] with padding masked, plus the state's key bias. Without a model mask, (B, 1, 1, M) padding mask
            and key bias; None if there is neither.
        """
        mask, bias = None, state.logit_bias
        if attention_mask is None and state.valid is not None:
            # Rows have different lengths. The mask is additive, which every attention implementation supports.
            mask = torch.zeros(state.valid.shape, dtype=dtype, device=state.valid.device)
            mask = mask.masked_fill(~state.valid, torch.finfo(dtype).min)[:, None, None]
        elif attention_mask is not None:
            assert state.valid is not None
            position = state.position
            rows, tokens = position.shape
            mask = attention_mask.expand(rows, -1, -1, -1)
            mask = mask.gather(2, position[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = mask.gather(3, position[:, None, None, :].expand(-1, mask.shape[1], tokens, -1))
            padding = ~state.valid[:, None, None]
            mask = mask & ~padding if mask.dtype == torch.bool else mask.masked_fill(padding, torch.finfo(mask.dtype).min)
        if bias is None:
            return mask
        bias = bias[:, None, None].to(dtype)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(dtype).min)
        return mask + bias
