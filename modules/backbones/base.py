"""What a backbone adapter tells about its family. One adapter a family, stateless, used as a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..cost.shape import BackboneShape
from ..scorers.base import TokenSpec
from ..tokens.state import TokenState
from ..tokens.trace import Trace

if TYPE_CHECKING:
    from ..config import CompressionConfig, RestoreConfig
    from ..stage import Stage


class Backbone:
    """Where layers, masks, protected tokens and positions are in one family of models.

    Attributes:
        model_type: the family's ``config.model_type``; a class without one is shared by families and no adapter itself.
        sites: sites that the family can offer, of SITES; all but ``before`` go through the two halves of a layer.
        classes: class names of the models it serves.
        refused: class names of the family that cannot be served, and why.
        takes_attention_mask: the models' forward understands an ``attention_mask`` for padded rows.
        masks_in_layers: layers add to their masks by themselves, for the full sequence; ``layer_mask`` does it for a shorter one.
        causal: a token's output may depend on no later token.
        positional: names of what the models hand their layers by position, after the hidden states.
        lora_targets: ends of names of the linear maps in a layer that LoRA adapts by default; None takes all of them.
    """

    model_type: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]]
    refused: ClassVar[Mapping[str, str]] = {}
    takes_attention_mask: ClassVar[bool] = True
    masks_in_layers: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    positional: ClassVar[tuple[str, ...]] = ("attention_mask",)
    lora_targets: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def base(cls, model: PreTrainedModel) -> nn.Module:
        """The model without its task head."""
        return getattr(model, model.base_model_prefix, model)

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        """Raises ValueError, with the cure, where this very model cannot be compressed. Called before anything is changed."""

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        """Raises ValueError, with the cure, where this very model cannot have these stages. Called before anything is changed."""

    @classmethod
    def check_shrinking(cls, stages: Sequence[Stage], restore: RestoreConfig | None, layers: int) -> None:
        """Raises ValueError, with the cure, where stages that shorten the sequence, and what restores it, do not go together here.

        Args:
            stages: those that shorten it, built.
            restore: where it gets its length back; None leaves it short.
            layers: of the model.
        """
        if restore is not None and restore.by == "dechunk":
            raise ValueError("compression.restore.by = 'dechunk' is for chunks of causal models; take unmerge or rejoin")

    @classmethod
    def packs(cls, config: PretrainedConfig) -> bool:
        """Rows may lie end to end: layers hand their attention function whatever mask they get, and nothing else tells rows apart."""
        return False

    @classmethod
    def patch_layer(cls, layer: nn.Module) -> None:
        """Called on every layer when stages are put in: leaves to ``layer_mask`` what only full-length layers can do."""

    @classmethod
    def unpatch_layer(cls, layer: nn.Module) -> None:
        """Called on every layer when stages are taken out: undoes ``patch_layer``."""

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        """The transformer layers, in order."""
        raise NotImplementedError

    @classmethod
    def shape(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> BackboneShape:
        """What the cost of this model depends on.

        Args:
            model: dense or compressed.
            size: of the input, height and width in pixels or tokens of a text; None takes the configured size.
        """
        raise NotImplementedError

    @classmethod
    def token_spec(cls, config: PretrainedConfig) -> TokenSpec:
        """What scorers are built for."""
        return TokenSpec(hidden_size=config.hidden_size, classes=config.num_labels or 0)

    @classmethod
    def prefix(cls, config: PretrainedConfig) -> int:
        """Protected tokens in front of the routable ones."""
        raise NotImplementedError

    @classmethod
    def added_inputs(cls, model: PreTrainedModel, trace: Trace | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of a forward that the adapter decides where its caller does not, over those that were given.

        Args:
            model: the compressed model.
            trace: the caller's; None where there is none.
            inputs: of the forward, by name.
        """
        return {}

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        """Notes on the trace what scorers and estimators may want to know of the model's inputs."""
        labels = inputs.get("labels")
        if trace.labels is None and isinstance(labels, Tensor):
            trace.labels = labels

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        """The outputs of a forward, made right where a head read filler: rows may leave the layers with different counts."""
        return outputs

    @classmethod
    def head_counts_places(cls, model: PreTrainedModel) -> bool:
        """The head wants a token for every place of the input, however many are left; ``finish`` sees to it."""
        return False

    @classmethod
    def begin(cls, trace: Trace, hidden_states: Tensor, attention_mask: Tensor | None) -> TokenState:
        """The state before the first stage, from what enters the first layer and the mask that it is handed."""
        rows, tokens, _ = hidden_states.shape
        return TokenState.initial(rows, tokens, trace.prefix, cls.valid_tokens(attention_mask), hidden_states.device)

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
            layer: one of ``layers``.
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
            mask[idx][:, idx] with filler masked out (B, 1, M, M), plus the state's key bias; without a mask, filler and key bias
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
            filler = ~state.valid[:, None, None]
            mask = mask & ~filler if mask.dtype == torch.bool else mask.masked_fill(filler, torch.finfo(mask.dtype).min)
        if bias is None:
            return mask
        bias = bias[:, None, None].to(dtype)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(dtype).min)
        return mask + bias
