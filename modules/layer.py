"""CompressedLayer: a layer that also runs stages, packing and restores."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .backbones.layer_adapter import LayerAdapter
from .backbones.stack import sharded
from .stage import Inner, Stage
from .tokens.flow import Flow, RowTokens
from .tokens.ragged import Packing
from .tokens.restore import restore
from .tokens.state import TokenState
from .tokens.trace import Trace

# Prefix of the names of generated classes.
CLASS_PREFIX = "Compressed"


@dataclass(frozen=True)
class LayerPlan:
    """The work of a compressed layer in addition to its stages.

    Attributes:
        stack: name of the stack that contains the layer.
        index: index of the layer in its stack, from 0.
        adapter: adapter of the layer.
        dense: the stack has no stages, so the layer runs unchanged.
        restore_before: kind of restore to full length that runs before the layer (a value of ``RESTORE``); None for no restore.
        restore_after: kind of restore that runs after the layer; None for no restore.
        notes_left: a later restore needs the hidden states from before each shrinking stage, so the layer stores them.
        packs: rows of different lengths are packed (varlen) before the layer.
        unpacks: rows are padded again after the layer.
        takes_present: the layer's input has places of absent tokens (``Stack.whole_until``).
        gives_absent: its output must have them.
    """

    stack: str
    index: int
    adapter: type[LayerAdapter]
    dense: bool = False
    restore_before: str | None = None
    restore_after: str | None = None
    notes_left: bool = False
    packs: bool = False
    unpacks: bool = True
    takes_present: bool = False
    gives_absent: bool = False


class CompressedLayer(nn.Module):
    """Mixin of generated layer classes: runs the stages at the layer's sites and passes the layer the mask of the current tokens.

    The stages run in ``__call__``, which gradient checkpointing does not recompute, so each decision is made once.
    """

    plan: LayerPlan

    def __call__(self, hidden_states: Tensor, *args: Any, trace: Trace | None = None, **kwargs: Any) -> Any:
        plan = self.plan
        if plan.dense:
            return super().__call__(hidden_states, *args, **kwargs)
        if trace is None:
            raise ValueError(f"layer {plan.index} of a compressed model was called without a trace: call the model, which passes one")
        inputs = dict(zip(plan.adapter.positional, args, strict=False)) | kwargs
        flow = trace.flow(plan.stack)
        if flow.causal_only:
            # While it is traced, transformers makes a mask all the same, with which attention takes twice the time.
            inputs["attention_mask"] = None
        if flow.state is None:
            hidden_states = flow.begin(plan.adapter.begin(flow, hidden_states, inputs.get("attention_mask")), hidden_states)
        elif plan.takes_present:
            hidden_states = flow.take_present(hidden_states)
        if plan.restore_before is not None:
            hidden_states = restore(hidden_states, flow, plan.restore_before)
        inputs = plan.adapter.begin_layer(self, flow.tokens, inputs)
        if (before := self._stage("before")) is not None:
            hidden_states = self._shrink(before, hidden_states, trace, inputs)
        if self._stage("around", "around_attention", "between", "around_mlp") is None:
            hidden_states = self._whole(hidden_states, flow, inputs)
        else:
            hidden_states = self._in_parts(hidden_states, trace, inputs)
        if plan.gives_absent:
            hidden_states = flow.give_absent(hidden_states)
        return hidden_states if plan.restore_after is None else restore(hidden_states, flow, plan.restore_after)

    def _whole(self, hidden_states: Tensor, flow: Flow, inputs: dict[str, Any]) -> Any:
        """The whole layer on all current tokens."""
        plan, state = self.plan, flow.tokens
        tokens = state.tokens_per_row
        flow.layer_tokens[plan.index] = RowTokens(tokens, tokens, tokens)
        if state.empty and not self.training and not sharded(self):
            # No row has a token, which is common while generating with chunks.
            return hidden_states
        unmasked = inputs.get("attention_mask") is None
        if plan.packs and not flow.keep_padded and unmasked and state.valid is not None and flow.packed is None:
            flow.packed = Packing.of(state, hidden_states)
            hidden_states = flow.packed.pack(hidden_states)
        if flow.packed is not None:
            inputs = inputs | {"attention_mask": flow.packed}
        else:
            inputs = plan.adapter.layer_inputs(self, state, hidden_states.dtype, inputs)
        hidden_states = plan.adapter.call(super().__call__, hidden_states, inputs)
        if flow.packed is not None and plan.unpacks:
            hidden_states, flow.packed = flow.packed.unpack(hidden_states), None
        return hidden_states

    def _in_parts(self, hidden_states: Tensor, trace: Trace, inputs: dict[str, Any]) -> Tensor:
        """The layer or its halves, with the stages around and between them."""
        plan, flow = self.plan, trace.flow(self.plan.stack)
        call = super().__call__

        def whole(tokens: Tensor, of: TokenState) -> Tensor:
            output: Tensor = plan.adapter.call(call, tokens, plan.adapter.layer_inputs(self, of, tokens.dtype, inputs))
            return output

        def attention(tokens: Tensor, of: TokenState) -> Tensor:
            own = plan.adapter.layer_inputs(self, of, tokens.dtype, inputs)
            return self._half(functools.partial(plan.adapter.attention_half, self, **own), tokens)

        def mlp(tokens: Tensor, of: TokenState) -> Tensor:
            return self._half(functools.partial(plan.adapter.mlp_half, self), tokens)

        present = flow.tokens.tokens_per_row
        if (around := self._stage("around")) is not None:
            hidden_states, tokens = self._bypass(around, hidden_states, trace, inputs, whole)
            flow.layer_tokens[plan.index] = RowTokens(present, tokens, tokens)
            return hidden_states
        hidden_states, attended = self._bypass(self._stage("around_attention"), hidden_states, trace, inputs, attention)
        if (between := self._stage("between")) is not None:
            hidden_states = self._shrink(between, hidden_states, trace, inputs)
        hidden_states, tokens = self._bypass(self._stage("around_mlp"), hidden_states, trace, inputs, mlp)
        flow.layer_tokens[plan.index] = RowTokens(present, attended, tokens)
        return hidden_states

    def _bypass(
        self, stage: Stage | None, hidden_states: Tensor, trace: Trace, inputs: dict[str, Any], inner: Inner
    ) -> tuple[Tensor, int | Tensor]:
        """Output of ``inner`` for the selected tokens (all tokens if there is no stage), and the number of tokens processed per row."""
        if stage is None:
            state = trace.flow(self.plan.stack).tokens
            return inner(hidden_states, state), state.tokens_per_row
        hidden_states = stage.around(hidden_states, self, trace, inner, inputs)
        return hidden_states, stage.processed(trace)

    def _shrink(self, stage: Stage, hidden_states: Tensor, trace: Trace, inputs: dict[str, Any]) -> Tensor:
        flow = trace.flow(self.plan.stack)
        if self.plan.notes_left:
            flow.left.append((hidden_states, flow.tokens))
        shorter: Tensor = stage(hidden_states, self, trace, inputs)
        return shorter

    def _half(self, half: Any, *args: Any) -> Tensor:
        """Half of a layer, recomputed in backward if gradient checkpointing is on."""
        if self.training and getattr(self, "gradient_checkpointing", False):
            recompute: Any = self._gradient_checkpointing_func
            half = functools.partial(recompute, half)
        output: Tensor = half(*args)
        return output

    def _stage(self, *sites: str) -> Stage | None:
        """The layer's stage at the first of ``sites`` that has one; None if none has."""
        stages = self._modules.get("stages")
        if isinstance(stages, nn.ModuleDict):
            for site in sites:
                if site in stages:
                    return cast(Stage, stages[site])
        return None


class Picklable:
    """Makes instances of a generated class picklable (spawned workers, ``copy``, ``torch.save``): no module holds the class by name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The state excludes what torch.compile stores on a module: it refers to the original object.
        return _empty_layer, (base_class(type(self)),), self.__getstate__()


def base_class(cls: type[Any]) -> type[Any]:
    """The original class of a generated class, or of a class derived from a generated one."""
    original: type[Any] = cls.original
    return original


@functools.cache
def compressed_layer_class(cls: Any) -> type[Any]:
    """The generated subclass of a layer's class."""
    attributes = {"__module__": cls.__module__, "__doc__": cls.__doc__, "original": cls}
    return type(CLASS_PREFIX + cls.__name__, (Picklable, CompressedLayer, cls), attributes)


def _empty_layer(cls: Any) -> Any:
    return object.__new__(compressed_layer_class(cls))
