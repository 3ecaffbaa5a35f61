"""compress(model, config) and decompress(model): the only place that edits a model.

A model becomes an instance of a generated subclass of its own class, and so do its layers. Names of parameters, ``generate``,
``save_pretrained``, PEFT and the Trainer of transformers go on as before; stages are new submodules under new names.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbones import backbone_for
from .backbones.base import Backbone
from .config import CompressionConfig
from .models.base import PatchSegmentation
from .packing import ATTENTION, Packing
from .restore import restore
from .stage import Inner, Stage
from .state import RowTokens, TokenState, Trace

PREFIX = "Compressed"
Model = TypeVar("Model", bound=PreTrainedModel)


def compress(model: Model, config: CompressionConfig) -> Model:
    """Puts token routers and mergers into a model, in place.

    Args:
        model: a transformers model of a supported family.
        config: its stages; every ``keep`` must be set (a budget's ``resolve`` sets them).

    Returns:
        The same object, now of a generated subclass of its class.

    Raises:
        ValueError: the model is compressed already, has no adapter, or the config asks for something that it cannot have.
            Nothing has been changed then.
    """
    if isinstance(model, CompressedModel):
        raise ValueError(f"{type(model).__name__} is compressed already: call decompress(model) first")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"compress needs a transformers model, not {type(model).__name__}")
    backbone = backbone_for(model.config.model_type, type(model).__name__)
    stages = build_stages(model, config, backbone)
    reference = next(model.parameters())
    for stage in stages:
        stage.to(device=reference.device, dtype=reference.dtype).train(model.training)
    _install(model, config, stages, backbone)
    original: Any = type(model)
    model.__class__ = compressed_class(original)
    _register_outputs(model)
    model.config.compression = config.to_dict()
    return model


def decompress(model: Model) -> Model:
    """Takes the stages out again, in place: the model is of its original class, with its original parameters.

    Raises:
        ValueError: the model is not compressed.
    """
    if not isinstance(model, CompressedModel):
        raise ValueError(f"{type(model).__name__} is not compressed")
    backbone = backbone_for(model.config.model_type, base_class(type(model)).__name__)
    for layer in backbone.layers(model):
        if "stages" in layer._modules:
            del layer.stages
        backbone.release(layer)
        del layer.plan
        layer.__class__ = base_class(type(layer))
    base = backbone.base(model)
    if base is not model:
        base.__class__ = base_class(type(base))
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation("sdpa")
    model.__class__ = base_class(type(model))
    del model.config.compression
    return model


def stages_of(model: PreTrainedModel) -> dict[str, tuple[int, Stage]]:
    """Layer and module of every stage of a compressed model, by stage name, in the order they run."""
    found: dict[str, tuple[int, Stage]] = {}
    for module in model.modules():
        if isinstance(module, CompressedLayer) and "stages" in module._modules:
            for stage in cast(nn.ModuleDict, module.stages).values():
                assert isinstance(stage, Stage)
                found[stage.config.key] = (module.plan.index, stage)
    return found


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns on transformers' gradient checkpointing, under the name that the installed version has for it."""
    # 5.17 knows only the older name, which later versions deprecate.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_stages(model: PreTrainedModel, config: CompressionConfig, backbone: type[Backbone]) -> list[Stage]:
    """Checks the config against the model and builds its stages, changing nothing."""
    backbone.check(model)
    config.check(len(backbone.layers(model)), backbone.sites)
    backbone.check_stages(model, config)
    short = [stage.key for stage in config.left_short()]
    if isinstance(model, PatchSegmentation) and short:
        after = len(backbone.layers(model))
        raise ValueError(
            f"compression.restore is needed: the head reads every patch, and after stages {', '.join(short)} tokens are missing; "
            f"give compression.restore = {{layer: {after}, by: unmerge}}, which restores them after the last layer, or 'by: rejoin'"
        )
    spec = backbone.token_spec(model.config)
    stages = [Stage(stage, spec, index, backbone) for index, stage in enumerate(config.stages)]
    _check_together(stages, config, len(backbone.layers(model)))
    implementation = model.config._attn_implementation
    for stage in stages:
        if stage.selector.adaptive and implementation not in ("sdpa", "eager", ATTENTION):
            raise ValueError(
                f"stage {stage.config.key!r}: selector {stage.config.part('selector').name!r} lets rows keep different numbers, which "
                f"attention {implementation!r} is not served with here: load the model with attn_implementation 'sdpa' or 'eager'"
            )
    return stages


def _check_together(stages: list[Stage], config: CompressionConfig, layers: int) -> None:
    """What no stage can see alone. Raises ValueError."""
    uneven = False
    for stage in stages:
        layer, site, restore = stage.config.layer, stage.config.site, config.restore
        where = f"stage {stage.config.key!r}"
        last = restore.layer if restore is not None and restore.layer > layer else layers
        if stage.estimator is not None and stage.estimator.needs_attention:
            attends = layer + 1 < last if site == "between" else site != "around_mlp"
            if not attends:
                raise ValueError(f"{where}: no attention follows that estimator 'key_bias' could learn from; take straight_through")
        if restore is not None and layer >= restore.layer:
            uneven = False
        if uneven and stage.merger.outputs is not None:
            raise ValueError(
                f"{where}: merger 'pool' takes rows of one length, which an adaptive selector before it does not leave; take top_k there"
            )
        uneven = uneven or (stage.selector.adaptive and not stage.bypass)


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

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, trace: Trace | None = None, **kwargs: Any
    ) -> Any:
        plan = self.plan
        if trace is None:
            raise ValueError(f"layer {plan.index} of a compressed model was called on its own: call the model, which makes the trace")
        if trace.state is None:
            rows, tokens, _ = hidden_states.shape
            valid = plan.backbone.valid_tokens(attention_mask)
            trace.begin(TokenState.initial(rows, tokens, trace.prefix, valid, hidden_states.device))
        if plan.restore_before is not None:
            hidden_states = restore(hidden_states, trace, plan.restore_before)
        if (before := self._stage("before")) is not None:
            hidden_states = self._shrink(before, hidden_states, trace)
        if self._stage("around", "around_attention", "between", "around_mlp") is None:
            hidden_states = self._whole(hidden_states, attention_mask, trace, args, kwargs)
        else:
            hidden_states = self._in_parts(hidden_states, attention_mask, trace, args, kwargs)
        return hidden_states if plan.restore_after is None else restore(hidden_states, trace, plan.restore_after)

    def _whole(self, hidden_states: Tensor, attention_mask: Tensor | None, trace: Trace, args: Any, kwargs: Any) -> Any:
        """The layer on all tokens that are left."""
        plan, state = self.plan, trace.state
        assert state is not None
        tokens = state.tokens_per_row
        trace.layer_tokens[plan.index] = RowTokens(tokens, tokens, tokens)
        if plan.packs and not trace.side_by_side and attention_mask is None and state.valid is not None and trace.packed is None:
            trace.packed = Packing.of(state, hidden_states.dtype)
            hidden_states = trace.packed.pack(hidden_states)
        mask: Any = trace.packed or plan.backbone.layer_mask(self, attention_mask, state, hidden_states.dtype, **kwargs)
        hidden_states = super().__call__(hidden_states, mask, *args, **kwargs)
        if trace.packed is not None and plan.unpacks:
            hidden_states, trace.packed = trace.packed.unpack(hidden_states), None
        return hidden_states

    def _in_parts(self, hidden_states: Tensor, attention_mask: Tensor | None, trace: Trace, args: Any, kwargs: Any) -> Tensor:
        """The layer or its halves, with the stages around and between them."""
        plan, state = self.plan, trace.state
        assert state is not None
        call = super().__call__

        def whole(tokens: Tensor, of: TokenState) -> Tensor:
            output: Tensor = call(tokens, plan.backbone.layer_mask(self, attention_mask, of, tokens.dtype, **kwargs), *args, **kwargs)
            return output

        def attention(tokens: Tensor, of: TokenState) -> Tensor:
            mask = plan.backbone.layer_mask(self, attention_mask, of, tokens.dtype, **kwargs)
            return self._half(functools.partial(plan.backbone.attention_half, self, **kwargs), tokens, mask, *args)

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


class Generated:
    """Lets pickle (spawned workers, ``copy``, ``torch.save`` of a model) rebuild a class that no module has by name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Without what torch.compile leaves on a module, which is bound to the original.
        return _empty, (base_class(type(self)),), self.__getstate__()


class CompressedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Mixin of generated model classes: makes the trace where the caller gives none, and notes the inputs on it."""

    backbone: type[Backbone]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        compression = CompressionConfig.from_dict(config.compression)
        _install(self, compression, build_stages(self, compression, self.backbone), self.backbone)
        _register_outputs(self)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own; rows are laid end to end only for the attention function that understands it."""
        plans = [(layer, layer.plan) for layer in self.backbone.layers(self) if isinstance(layer, CompressedLayer)]
        if attn_implementation == "sdpa" and any(stage.selector.adaptive for _, stage in stages_of(self).values()):
            attn_implementation = ATTENTION if self.backbone.packs(self.config) else attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for layer, plan in plans:
            layer.plan = replace(plan, packs=attn_implementation == ATTENTION)

    def note(self, trace: Trace | None, inputs: dict[str, Any]) -> Trace:
        """The trace of this forward: the caller's, or a new one."""
        trace = Trace() if trace is None else trace
        if trace.state is not None:
            raise ValueError("this trace has seen a forward already: make a new Trace for each forward")
        if unknown := (trace.keep.keys() | trace.replay.keys()) - stages_of(self).keys():
            raise ValueError(f"the trace speaks of stages {', '.join(sorted(unknown))}: the model has {', '.join(stages_of(self))}")
        # Where hidden states of layers are given out, they must be of rows.
        asked = inputs.get("output_hidden_states")
        trace.side_by_side = bool(self.config.output_hidden_states if asked is None else asked) or trace.side_by_side
        trace.under_head = trace.under_head or self.backbone.base(self) is not self
        trace.prefix = self.backbone.prefix(self.config)
        self.backbone.bind_inputs(self, trace, inputs)
        return trace


def base_class(cls: type[Any]) -> type[Any]:
    """The class that a generated class was made from."""
    return cls.__bases__[-1]


@functools.cache
def compressed_class(cls: Any) -> type[Any]:
    """The generated subclass of a model class."""
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, trace: Trace | None = None, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if added := self.backbone.added_inputs(self, trace, inputs):
            args, kwargs = (), inputs | added
        trace = self.note(trace, inputs | added)
        return self.backbone.finish(self, cls.forward(self, *args, trace=trace, **kwargs), trace)

    # transformers tells its own classes from a user's by the module's name, and treats only its own as fully supported.
    attributes = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "backbone": backbone_for(cls.config_class.model_type, cls.__name__),
        "forward": forward,
    }
    return type(PREFIX + cls.__name__, (Generated, CompressedModel, cls), attributes)


@functools.cache
def _compressed_layer_class(cls: Any) -> type[Any]:
    return type(PREFIX + cls.__name__, (Generated, CompressedLayer, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _install(model: PreTrainedModel, config: CompressionConfig, stages: list[Stage], backbone: type[Backbone]) -> None:
    layers = backbone.layers(model)
    of_layer: list[dict[str, Stage]] = [{} for _ in layers]
    for stage in stages:
        of_layer[stage.config.layer][stage.config.site] = stage
    adaptive = any(stage.selector.adaptive for stage in stages)
    # The other attention functions would not know what to do with a packing.
    packs = adaptive and backbone.packs(model.config) and model.config._attn_implementation in ("sdpa", ATTENTION)
    plans = _plans(config, backbone, of_layer, packs)
    for plan, layer in zip(plans, layers, strict=True):
        plain: Any = type(layer)
        layer.__class__ = _compressed_layer_class(plain)
        assert isinstance(layer, CompressedLayer)
        layer.plan = plan
        backbone.adopt(layer)
        if of_layer[plan.index]:
            layer.stages = nn.ModuleDict(of_layer[plan.index])
    if packs:
        model.set_attn_implementation(ATTENTION)
    base = backbone.base(model)
    if base is not model:
        inner: Any = type(base)
        base.__class__ = compressed_class(inner)
        _register_outputs(base)


def _plans(config: CompressionConfig, backbone: type[Backbone], of_layer: list[dict[str, Stage]], packs: bool) -> list[LayerPlan]:
    """The plan of every layer, in order."""
    last, where = len(of_layer) - 1, config.restore

    def reads_rows(index: int) -> bool:
        return index > last or bool(of_layer[index]) or (where is not None and where.layer == index)

    return [
        LayerPlan(
            index=index,
            backbone=backbone,
            restore_before=where.by if where is not None and where.layer == index else None,
            restore_after=where.by if where is not None and where.layer == index + 1 == last + 1 else None,
            notes_left=where is not None and index < where.layer,
            packs=packs,
            unpacks=reads_rows(index + 1),
        )
        for index in range(last + 1)
    ]


def _register_outputs(model: Any) -> None:
    """Lets transformers find what its hooks may record, which it files under the class's name."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def _empty(cls: Any) -> Any:
    compressed = compressed_class(cls) if issubclass(cls, PreTrainedModel) else _compressed_layer_class(cls)
    return object.__new__(compressed)
