"""Generated model classes, and functions that add stages to a model and remove them.

A compressed model is an instance of a generated subclass of its own class, and so are its layers. Parameter names, ``generate``,
``save_pretrained``, PEFT and the transformers Trainer work unchanged; stages are new submodules under new names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .backbones import adapter_for
from .backbones.model_adapter import ModelAdapter
from .backbones.stack import Stack
from .compatibility import check_config, check_stages
from .config import PARTS, CompressionConfig, RestoreConfig
from .decoding.generation import Generating
from .decoding.kernels import kernels_for
from .layer import CLASS_PREFIX, CompressedLayer, LayerPlan, base_class, compressed_layer_class
from .rules.candidate import Candidate
from .rules.neighbours import read_by
from .stage import Stage, stages_of
from .stages.following import stage_class
from .tokens.ragged import ATTENTION
from .tokens.trace import Trace


class CompressedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Mixin of generated model classes: creates the trace if the caller passes none, and stores the forward's inputs on its flows."""

    adapter: type[ModelAdapter]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        compression = CompressionConfig.from_dict(config.compression)
        stages = build_stages(self, compression, self.adapter)
        # Thresholds are compared with float32 scores. Loading would round them to bf16 and change decisions.
        exact = {f"selector.{name}" for stage in stages for name in stage.selector.float32_buffers}
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *exact}
        install(self, compression, stages, self.adapter)
        _register_outputs(self)

    def __call__(self, *args: Any, trace: Trace | None = None, **kwargs: Any) -> Any:
        """The forward. A compiled model reads step, noise and progress of the trace as tensors: as numbers each step would be compiled anew."""
        call = super().__call__
        if trace is None or self._compiled_call_impl is None:
            return call(*args, **kwargs) if trace is None else call(*args, trace=trace, **kwargs)
        with trace.as_tensors(self.device):
            return call(*args, trace=trace, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle rebuilds the generated class, which no module holds by name. The state excludes what torch.compile stores on a module.
        return _empty_model, (base_class(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers applies some steps, such as renaming weights, only to its own classes. They are needed here too, also if
        # transformers loaded this file as remote code.
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """``save_pretrained`` of transformers, with the model's current parameter names.

        Raises:
            ValueError: the model contains LoRA, whose weights transformers would save under names that it cannot load; or a part was
                given as a class or object that a config cannot name.
        """
        if hasattr(self, "peft_config"):
            raise ValueError(
                "save_pretrained would save LoRA under names that cannot be loaded: call laconic.save_adapter, or laconic.merge_lora first"
            )
        check_savable(self)
        # By default transformers saves under a checkpoint's original names, and renames them back at loading only for its own classes.
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """``set_attn_implementation`` of transformers; rows are packed only with the attention function that supports packing."""
        stages = stages_of(self).values()
        stacks = {stack.name: stack for stack in self.adapter.stacks(self)}
        if attn_implementation == "sdpa" and any(_packs(stack, stages) for stack in stacks.values()):
            attn_implementation = ATTENTION
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for stack in stacks.values():
            for layer in stack.layers:
                if isinstance(layer, CompressedLayer):
                    layer.plan = replace(layer.plan, packs=not layer.plan.dense and stack.attention == ATTENTION)

    def bind_trace(self, trace: Trace | None, inputs: dict[str, Any]) -> Trace:
        """The trace of this forward: the caller's, or a new one with the labels from ``inputs``."""
        trace = Trace(labels=self.adapter.labels(self, inputs)) if trace is None else trace
        if any(flow.state is not None for flow in trace.flows.values()):
            raise ValueError("this trace was already used in a forward: make a new Trace for each forward")
        if named := trace.keep.keys() | trace.replay.keys():
            there = stages_of(self)
            if unknown := named - there.keys():
                raise ValueError(f"the trace names unknown stages {', '.join(sorted(unknown))}: the model has {', '.join(there)}")
        requested = inputs.get("output_hidden_states")
        requested = bool(self.config.output_hidden_states if requested is None else requested)
        for flow in (trace.flow(stack.name) for stack in self.adapter.stacks(self)):
            # Hidden states that the model returns must have padded rows, not packed ones.
            flow.keep_padded = requested or flow.keep_padded
            flow.under_head = flow.under_head or self.adapter.base(self) is not self
        if self.adapter.base(self) is self:
            # A model with a head calls its base with the same trace.
            self.adapter.bind_inputs(self, trace, inputs)
        return trace


def check_savable(model: PreTrainedModel) -> None:
    """Raises ValueError if a stage has a part that a saved config cannot name."""
    for stage in stages_of(model).values():
        for kind in PARTS:
            given = getattr(stage.config, kind)
            if given is not None and (why := given.unsaved(kind)) is not None:
                raise ValueError(f"stage {stage.config.key!r} cannot be saved: {why}")


@functools.cache
def compressed_class(cls: Any) -> type[Any]:
    """The generated subclass of a model class."""
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, trace: Trace | None = None, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if added := self.adapter.added_inputs(self, trace, inputs):
            args, kwargs = (), inputs | added
        trace = self.bind_trace(trace, inputs | added)
        if encoded := self.adapter.encode(self, trace, inputs | added):
            args, kwargs = (), inputs | added | encoded
        with kernels_for((inputs | added).get("past_key_values")):
            return self.adapter.finish(self, cls.forward(self, *args, trace=trace, **kwargs), trace)

    # transformers recognises its own classes by the module name, and supports only those fully.
    attributes = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "original": cls,
        "adapter": adapter_for(cls.config_class.model_type, cls.__name__),
        "forward": forward,
    }
    mixins = (Generating,) if issubclass(cls, GenerationMixin) else ()
    return type(CLASS_PREFIX + cls.__name__, (*mixins, CompressedModel, cls), attributes)


def build_stages(model: PreTrainedModel, config: CompressionConfig, adapter: type[ModelAdapter]) -> list[Stage]:
    """Checks the config against the model and builds its stages, in running order. The model is not changed.

    Raises:
        ValueError: the model does not support these stages.
    """
    candidate = Candidate(model, adapter, config)
    check_config(candidate)
    stages: list[Stage] = []
    for stack in adapter.stacks(model):
        spec = adapter.token_spec(model, stack) if config.of_stack(stack.name) else None
        own = config.of_stack(stack.name)
        for place, stage in enumerate(own):
            assert spec is not None
            read = read_by(stage, own)
            # A stage that follows has the counts of the one that decides.
            place = place if stage.follows is None or read is None else own.index(read)
            stages.append(stage_class(stage)(stage, spec, len(stages), stack.adapter, place, len(own), None if read is None else read.key))
    check_stages(replace(candidate, stages=stages))
    return stages


def install(model: PreTrainedModel, config: CompressionConfig, stages: Sequence[Stage], adapter: type[ModelAdapter]) -> None:
    """Adds built stages to a model; its layers and base become instances of generated classes."""
    for stack in adapter.stacks(model):
        own = [stage for stage in stages if stage.config.stack == stack.name]
        at: list[dict[str, Stage]] = [{} for _ in stack.layers]
        for stage in own:
            at[int(stage.config.layer)][stage.config.site] = stage
        packs = _packs(stack, own) and stack.attention in ("sdpa", ATTENTION)
        restored = config.restores.get(stack.name)
        # Causal layers have a cache that knows which tokens a layer processed, so they are compressed in any case.
        dense = not own and not stack.adapter.causal and not adapter.begins_short(stack.name, config)
        for plan, layer in zip(_plans(stack, restored, at, packs, dense), stack.layers, strict=True):
            plain: Any = type(layer)
            layer.__class__ = compressed_layer_class(plain)
            assert isinstance(layer, CompressedLayer)
            layer.plan = plan
            if not plan.dense:
                stack.adapter.patch_layer(layer)
            if at[plan.index]:
                layer.stages = nn.ModuleDict(at[plan.index])
        if packs:
            adapter.set_attention(model, stack, ATTENTION)
    base = adapter.base(model)
    if base is not model:
        inner: Any = type(base)
        base.__class__ = compressed_class(inner)
        _register_outputs(base)


def uninstall(model: PreTrainedModel, adapter: type[ModelAdapter]) -> None:
    """Reverts ``install``."""
    for stack in adapter.stacks(model):
        for layer in stack.layers:
            assert isinstance(layer, CompressedLayer)
            if "stages" in layer._modules:
                del layer.stages
            if not layer.plan.dense:
                stack.adapter.unpatch_layer(layer)
            del layer.plan
            layer.__class__ = base_class(type(layer))
        if stack.attention == ATTENTION:
            adapter.set_attention(model, stack, "sdpa")
    base = adapter.base(model)
    if base is not model:
        base.__class__ = base_class(type(base))


def become(model: PreTrainedModel, cls: type[Any]) -> None:
    """Changes a model's class to a generated class."""
    model.__class__ = cls
    _register_outputs(model)


def _packs(stack: Stack, stages: Any) -> bool:
    """True if rows of the stack may have different lengths and its layers support packing."""
    # Other attention functions do not support a Packing as their mask.
    adaptive = any(stage.selector.adaptive for stage in stages if stage.config.stack == stack.name)
    return adaptive and stack.adapter.packs(stack.config)


def _plans(stack: Stack, restore: RestoreConfig | None, at: list[dict[str, Stage]], packs: bool, dense: bool) -> list[LayerPlan]:
    """The LayerPlan of every layer of a stack, in order."""
    last = len(at) - 1

    def reads_rows(index: int) -> bool:
        return index > last or bool(at[index]) or (restore is not None and restore.layer == index)

    return [
        LayerPlan(
            stack=stack.name,
            index=index,
            adapter=stack.adapter,
            dense=dense,
            restore_before=restore.by if restore is not None and restore.layer == index else None,
            restore_after=restore.by if restore is not None and restore.layer == index + 1 == last + 1 else None,
            notes_left=restore is not None and index < restore.layer,
            packs=packs,
            unpacks=reads_rows(index + 1),
            takes_present=0 < index <= stack.whole_until,
            gives_absent=index < stack.whole_until,
        )
        for index in range(last + 1)
    ]


def _register_outputs(model: Any) -> None:
    """Registers the outputs that transformers' hooks may record, which transformers looks up by class."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    # The key is the class's text up to transformers 5.17, and the model in later versions.
    key: Any = str(type(model)) if type(_CAN_RECORD_REGISTRY) is dict else model
    _CAN_RECORD_REGISTRY[key] = model._can_record_outputs


def _empty_model(cls: Any) -> Any:
    return object.__new__(compressed_class(cls))
