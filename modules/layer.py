"""What a layer of a compressed model does beside its own arithmetic."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .backbones.base import Backbone
from .stage import Inner, Stage, sharded
from .tokens.ragged import Packing
from .tokens.restore import restore
from .tokens.state import TokenState
from .tokens.trace import RowTokens, Trace


@dataclass(frozen=True)
class LayerPlan:
    """What a compressed layer does beside its stages.

    Attributes:
        index: of the layer, from 0.
        backbone: adapter of the family.
        restore_before: how the sequence gets its full length back before the layer; None leaves it.
        restore_after: the same after it.
        notes_left: a restore follows and wants to know what tokens were before they went.
        packs: rows of different lengths are laid end to end for the layer.
        unpacks: what follows the layer reads rows side by side.
    """

    index: int
    backbone: type[Backbone]
    restore_before: str | None = None
    restore_after: str | None = None
    notes_left: bool = False
    packs: bool = False
    unpacks: bool = True


class CompressedLayer(nn.Module):
    """Mixin of generated layer classes: runs the stages at the layer's sites and hands it the mask of the tokens that it sees.

    All of it happens in ``__call__``, outside what gradient checkpointing recomputes, so a decision is made once.
    """

    plan: LayerPlan

    def __call__(self, hidden_states: Tensor, *args: Any, trace: Trace | None = None, **kwargs: Any) -> Any:
        plan = self.plan
        if trace is None:
            raise ValueError(f"layer {plan.index} of a compressed model was called on its own: call the model, which makes the trace")
        inputs = dict(zip(plan.backbone.positional, args, strict=False)) | kwargs
        if trace.state is None:
            trace.begin(plan.backbone.begin(trace, hidden_states, inputs.get("attention_mask")))
        if plan.restore_before is not None:
            hidden_states = restore(hidden_states, trace, plan.restore_before)
        inputs = plan.backbone.begin_layer(self, cast(TokenState, trace.state), inputs)
        if (before := self._stage("before")) is not None:
            hidden_states = self._shrink(before, hidden_states, trace)
        if self._stage("around", "around_attention", "between", "around_mlp") is None:
            hidden_states = self._whole(hidden_states, trace, inputs)
        else:
            hidden_states = self._in_parts(hidden_states, trace, inputs)
        return hidden_states if plan.restore_after is None else restore(hidden_states, trace, plan.restore_after)

    def _whole(self, hidden_states: Tensor, trace: Trace, inputs: dict[str, Any]) -> Any:
        """The layer on all tokens that are left."""
        plan, state = self.plan, trace.state
        assert state is not None
        tokens = state.tokens_per_row
        trace.layer_tokens[plan.index] = RowTokens(tokens, tokens, tokens)
        if state.empty and not self.training and not sharded(self):
            # No row has a token here, as in most steps of generating with chunks.
            return hidden_states
        unmasked = inputs.get("attention_mask") is None
        if plan.packs and not trace.side_by_side and unmasked and state.valid is not None and trace.packed is None:
            trace.packed = Packing.of(state, hidden_states)
            hidden_states = trace.packed.pack(hidden_states)
        if trace.packed is not None:
            inputs = inputs | {"attention_mask": trace.packed}
        else:
            inputs = plan.backbone.layer_inputs(self, state, hidden_states.dtype, inputs)
        hidden_states = super().__call__(hidden_states, **inputs)
        if trace.packed is not None and plan.unpacks:
            hidden_states, trace.packed = trace.packed.unpack(hidden_states), None
        return hidden_states

    def _in_parts(self, hidden_states: Tensor, trace: Trace, inputs: dict[str, Any]) -> Tensor:
        """The layer or its halves, with the stages around and between them."""
        plan, state = self.plan, trace.state
        assert state is not None
        call = super().__call__

        def whole(tokens: Tensor, of: TokenState) -> Tensor:
            output: Tensor = call(tokens, **plan.backbone.layer_inputs(self, of, tokens.dtype, inputs))
            return output

        def attention(tokens: Tensor, of: TokenState) -> Tensor:
            own = plan.backbone.layer_inputs(self, of, tokens.dtype, inputs)
            return self._half(functools.partial(plan.backbone.attention_half, self, **own), tokens)

        def mlp(tokens: Tensor, of: TokenState) -> Tensor:
            return self._half(functools.partial(plan.backbone.mlp_half, self), tokens)

        present = state.tokens_per_row
        if (around := self._stage("around")) is not None:
            hidden_states, tokens = self._bypass(around, hidden_states, trace, whole)
            trace.layer_tokens[plan.index] = RowTokens(present, tokens, tokens)
            return hidden_states
        hidden_states, attended = self._bypass(self._stage("around_attention"), hidden_states, trace, attention)
        if (between := self._stage("between")) is not None:
            hidden_states = self._shrink(between, hidden_states, trace)
        hidden_states, tokens = self._bypass(self._stage("around_mlp"), hidden_states, trace, mlp)
        trace.layer_tokens[plan.index] = RowTokens(present, attended, tokens)
        return hidden_states

    def _bypass(self, stage: Stage | None, hidden_states: Tensor, trace: Trace, inner: Inner) -> tuple[Tensor, int | Tensor]:
        """What ``inner`` makes of the tokens that a stage chooses, or of all, and the number of those in a row."""
        state = trace.state
        assert state is not None
        if stage is None:
            return inner(hidden_states, state), state.tokens_per_row
        hidden_states = stage.around(hidden_states, self, trace, inner)
        return hidden_states, trace.routings[stage.config.key].kept + state.protected_per_row

    def _shrink(self, stage: Stage, hidden_states: Tensor, trace: Trace) -> Tensor:
        assert trace.state is not None
        if self.plan.notes_left:
            trace.left.append((hidden_states, trace.state))
        shorter: Tensor = stage(hidden_states, self, trace)
        return shorter

    def _half(self, half: Any, *args: Any) -> Tensor:
        """Half a layer, recomputed in backward where gradient checkpointing is on."""
        if self.training and getattr(self, "gradient_checkpointing", False):
            recompute: Any = self._gradient_checkpointing_func
            half = functools.partial(recompute, half)
        output: Tensor = half(*args)
        return output

    def _stage(self, *sites: str) -> Stage | None:
        """The first stage of the layer at one of the sites."""
        stages = self._modules.get("stages")
        if isinstance(stages, nn.ModuleDict):
            for site in sites:
                if site in stages:
                    return cast(Stage, stages[site])
        return None
