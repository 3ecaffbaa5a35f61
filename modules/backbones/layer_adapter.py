"""What a layer adapter says of one family of layers: halves, masks, keys, positions. Stateless, used as a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..tokens.flow import Flow
from ..tokens.state import TokenState


class LayerAdapter:
    """One family of layers. It is used as it is wherever such layers occur, also inside models of several parts.

    Attributes:
        sites: that the layers offer, of SITES; all but ``before`` go through the two halves of a layer.
        scopes: of SCOPES, which tokens a stage may be limited to.
        attentions: attention implementations that the layers run under stages; None for any.
        masks_in_layers: layers add to their masks by themselves, for the full sequence; ``layer_mask`` does it for a shorter one.
        causal: a token's output may depend on no later token.
        positional: names of what the models hand their layers by position, after the hidden states.
        lora_targets: ends of names of the linear maps in a layer that LoRA adapts by default; None takes all of them.
        no_keys: why ``keys`` cannot be computed; None where it can.
        no_cls_query: why ``cls_query_and_keys`` cannot be computed; None where it can.
    """

    sites: ClassVar[tuple[str, ...]]
    scopes: ClassVar[tuple[str, ...]] = ("all",)
    attentions: ClassVar[tuple[str, ...] | None] = None
    masks_in_layers: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    positional: ClassVar[tuple[str, ...]] = ("attention_mask",)
    lora_targets: ClassVar[tuple[str, ...] | None] = None
    no_keys: ClassVar[str | None] = None
    no_cls_query: ClassVar[str | None] = None

    @classmethod
    def leading(cls, config: PretrainedConfig) -> int:
        """Protected tokens at the start of each row."""
        raise NotImplementedError

    @classmethod
    def refused_sites(cls, config: PretrainedConfig) -> Mapping[str, str]:
        """Sites that layers of this configuration cannot offer, and why."""
        return {}

    @classmethod
    def packs(cls, config: PretrainedConfig) -> bool:
        """Rows may be packed: layers hand their attention function whatever mask they get, and nothing else tells rows apart."""
        return False

    @classmethod
    def patch_layer(cls, layer: nn.Module) -> None:
        """Called on every layer when stages are put in: leaves to ``layer_mask`` what only full-length layers can do."""

    @classmethod
    def unpatch_layer(cls, layer: nn.Module) -> None:
        """Called on every layer when stages are taken out: undoes ``patch_layer``."""

    @classmethod
    def begin(cls, flow: Flow, hidden_states: Tensor, attention_mask: Tensor | None) -> TokenState:
        """The state before the first stage, from what enters the first layer and the mask that it is handed."""
        rows, tokens, _ = hidden_states.shape
        return TokenState.initial(rows, tokens, flow.leading, cls.valid_tokens(attention_mask), hidden_states.device)

    @classmethod
    def begin_layer(cls, layer: nn.Module, state: TokenState, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model hands a layer, by name, once a forward before anything of the layer runs."""
        return inputs

    @classmethod
    def layer_inputs(cls, layer: nn.Module, state: TokenState, dtype: torch.dtype, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer or its attention half is handed for the current tokens, by name.

        Args:
            layer: the layer that is about to run.
            state: the tokens that it will see.
            dtype: of an additive mask.
            inputs: what ``begin_layer`` gave.
        """
        others = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return others | {"attention_mask": cls.layer_mask(layer, inputs.get("attention_mask"), state, dtype, **others)}

    @classmethod
    def slice_inputs(cls, inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Of what a layer is handed, that of the first tokens by plain slicing, for measuring how fast a layer could be."""
        return dict(inputs)

    @classmethod
    def attention_half(cls, layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The first half of a layer, residual included; ``mlp_half`` of it is bit-equal to the layer's forward.

        Args:
            layer: of the family.
            hidden_states: (B, M, C).
            attention_mask: what ``layer_mask`` gave.
            kwargs: whatever else the model hands its layers.

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
        """(B, H, M, D) keys that the layer's attention computes from its (B, M, C) input, its norm applied first."""
        raise NotImplementedError

    @classmethod
    def cls_query_and_keys(cls, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, float]:
        """Query of the first token (B, H, 1, D), keys of all (B, H, M, D) and the attention's scale, for this layer."""
        raise NotImplementedError

    @classmethod
    def layer_mask(
        cls, layer: nn.Module, attention_mask: Tensor | None, state: TokenState, dtype: torch.dtype, **kwargs: Any
    ) -> Tensor | None:
        """Everything that this layer adds to its attention logits, for the current tokens.

        Args:
            layer: the layer that is about to run.
            attention_mask: what the model handed the layer, over the original tokens.
            state: the current tokens.
            dtype: of an additive mask, that of the queries.
            kwargs: whatever else the model hands its layers.
        """
        return cls.gather_mask(attention_mask, state, dtype)

    @staticmethod
    def valid_tokens(attention_mask: Tensor | None) -> Tensor | None:
        """(B, M) bool from the mask that the model made for its layers, (B, 1, M, M) bool or additive; None without one."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 4:
            raise ValueError(
                f"attention mask of shape {tuple(attention_mask.shape)}: compression understands (batch, 1, queries, keys); "
                "use attn_implementation 'sdpa' or 'eager' for padded batches"
            )
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(attention_mask.dtype).min / 2
        return seen.any(2).any(1)

    @staticmethod
    def gather_mask(attention_mask: Tensor | None, state: TokenState, dtype: torch.dtype) -> Tensor | None:
        """The mask that a layer needs for the current tokens.

        Args:
            attention_mask: (B, 1, N, N) the mask over the original tokens, bool or additive; None where the model has none.
            state: the current tokens.
            dtype: of an additive mask, that of the queries.

        Returns:
            mask[idx][:, idx] with padding masked out (B, 1, M, M), plus the state's key bias; without a mask, padding and key bias
            alone (B, 1, 1, M); None where there is neither.
        """
        mask, bias = None, state.logit_bias
        if attention_mask is None and state.valid is not None:
            # Rows that keep different numbers; additive, which every attention implementation understands.
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
