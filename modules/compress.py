"""compress(model, config) and decompress(model): the only place that edits a model.

A model becomes an instance of a generated subclass of its own class, and so do its layers. Names of parameters, ``generate``,
``save_pretrained``, PEFT and the Trainer of transformers go on as before; stages are new submodules under new names.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .backbones import backbone_for
from .backbones.base import Backbone
from .config import CompressionConfig
from .decoding.generation import Generating
from .heads.base import PatchSegmentation
from .layer import CompressedLayer, LayerPlan
from .stage import Stage
from .tokens.ragged import ATTENTION
from .tokens.trace import Trace

CLASS_PREFIX = "Compressed"
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
        backbone.unpatch_layer(layer)
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
    backbone.check_shrinking([stage for stage in stages if not stage.bypass], config.restore, len(backbone.layers(model)))
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


class Picklable:
    """Lets pickle (spawned workers, ``copy``, ``torch.save`` of a model) rebuild a class that no module has by name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Without what torch.compile leaves on a module, which is bound to the original.
        return _empty, (base_class(type(self)),), self.__getstate__()


class CompressedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Mixin of generated model classes: makes the trace where the caller gives none, and notes the inputs on it."""

    backbone: type[Backbone]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Thresholds are compared with float32 scores: rounded to bf16 by loading, they would decide otherwise than they were trained to.
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), "selector.threshold", "selector.batches"}
        compression = CompressionConfig.from_dict(config.compression)
        _install(self, compression, build_stages(self, compression, self.backbone), self.backbone)
        _register_outputs(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Also where transformers loaded this very file as remote code: what it does for its own classes alone, such as renaming
        # weights, is meant for these too.
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, under the names that the model has.

        Raises:
            ValueError: there is LoRA in the model, which transformers would save under names that nothing loads.
        """
        if hasattr(self, "peft_config"):
            raise ValueError(
                "save_pretrained would mix LoRA into the weights' names: call laconic.save_adapter, or laconic.merge_lora first"
            )
        # transformers files the older names of a checkpoint under the names of its own classes: it would save them and not know them again.
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own; rows are laid end to end only for the attention function that understands it."""
        plans = [(layer, layer.plan) for layer in self.backbone.layers(self) if isinstance(layer, CompressedLayer)]
        if attn_implementation == "sdpa" and any(stage.selector.adaptive for _, stage in stages_of(self).values()):
            attn_implementation = ATTENTION if self.backbone.packs(self.config) else attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for layer, plan in plans:
            layer.plan = replace(plan, packs=attn_implementation == ATTENTION)

    def bind_trace(self, trace: Trace | None, inputs: dict[str, Any]) -> Trace:
        """The trace of this forward: the caller's, or a new one."""
        trace = Trace() if trace is None else trace
        if trace.state is not None:
            raise ValueError("this trace has seen a forward already: make a new Trace for each forward")
        if named := trace.keep.keys() | trace.replay.keys():
            there = stages_of(self)
            if unknown := named - there.keys():
                raise ValueError(f"the trace speaks of stages {', '.join(sorted(unknown))}: the model has {', '.join(there)}")
        # Where hidden states of layers are given out, they must be of rows.
        asked = inputs.get("output_hidden_states")
        trace.side_by_side = bool(self.config.output_hidden_states if asked is None else asked) or trace.side_by_side
        trace.under_head = trace.under_head or self.backbone.base(self) is not self
        trace.prefix = self.backbone.prefix(self.config)
        self.backbone.bind_inputs(self, trace, inputs)
        return trace


def base_class(cls: type[Any]) -> type[Any]:
    """The class that a generated class, or one derived from it, was made from."""
    original: type[Any] = cls.original
    return original


@functools.cache
def compressed_class(cls: Any) -> type[Any]:
    """The generated subclass of a model class."""
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, trace: Trace | None = None, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if added := self.backbone.added_inputs(self, trace, inputs):
            args, kwargs = (), inputs | added
        trace = self.bind_trace(trace, inputs | added)
        return self.backbone.finish(self, cls.forward(self, *args, trace=trace, **kwargs), trace)

    # transformers tells its own classes from a user's by the module's name, and treats only its own as fully supported.
    attributes = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "original": cls,
        "backbone": backbone_for(cls.config_class.model_type, cls.__name__),
        "forward": forward,
    }
    mixins = (Picklable, Generating) if issubclass(cls, GenerationMixin) else (Picklable,)
    return type(CLASS_PREFIX + cls.__name__, (*mixins, CompressedModel, cls), attributes)


@functools.cache
def _compressed_layer_class(cls: Any) -> type[Any]:
    attributes = {"__module__": cls.__module__, "__doc__": cls.__doc__, "original": cls}
    return type(CLASS_PREFIX + cls.__name__, (Picklable, CompressedLayer, cls), attributes)


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
        backbone.patch_layer(layer)
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

    # Up to 5.17 by the class's text, later by the model.
    key: Any = str(type(model)) if type(_CAN_RECORD_REGISTRY) is dict else model
    _CAN_RECORD_REGISTRY[key] = model._can_record_outputs


def _empty(cls: Any) -> Any:
    compressed = compressed_class(cls) if issubclass(cls, PreTrainedModel) else _compressed_layer_class(cls)
    return object.__new__(compressed)
