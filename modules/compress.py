"""compress(model, config) and decompress(model): the only place that edits a model.

A model becomes an instance of a generated subclass of its own class, and so do its layers. Names of parameters, ``generate``,
``save_pretrained``, PEFT and the Trainer of transformers go on as before; stages are new submodules under new names.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbones import backbone_for
from .backbones.base import Backbone
from .config import SITES, CompressionConfig
from .stage import Stage
from .state import TokenState, Trace

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
    _install(model, stages, backbone)
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
        if "stage" in layer._modules:
            del layer.stage
        backbone.release(layer)
        del layer.layer_index, layer.backbone
        layer.__class__ = base_class(type(layer))
    base = backbone.base(model)
    if base is not model:
        base.__class__ = base_class(type(base))
    model.__class__ = base_class(type(model))
    del model.config.compression
    return model


def stages_of(model: PreTrainedModel) -> dict[str, tuple[int, Stage]]:
    """Layer and module of every stage of a compressed model, by stage name, in the order they run."""
    found: dict[str, tuple[int, Stage]] = {}
    for module in model.modules():
        stage = getattr(module, "stage", None) if isinstance(module, CompressedLayer) else None
        if isinstance(stage, Stage):
            found[stage.config.key] = (cast(int, module.layer_index), stage)
    return found


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns on transformers' gradient checkpointing, under the name that the installed version has for it."""
    # 5.17 knows only the older name, which later versions deprecate.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_stages(model: PreTrainedModel, config: CompressionConfig, backbone: type[Backbone]) -> list[Stage]:
    """Checks the config against the model and builds its stages, changing nothing."""
    backbone.check(model)
    config.check(len(backbone.layers(model)), tuple(site for site in SITES if site in backbone.sites))
    spec = backbone.token_spec(model.config)
    return [Stage(stage, spec, index, backbone) for index, stage in enumerate(config.stages)]


class CompressedLayer(nn.Module):
    """Mixin of generated layer classes: runs the stage before the layer and hands the layer the mask of the tokens left.

    All of it happens in ``__call__``, outside what gradient checkpointing recomputes, so a decision is made once.
    """

    layer_index: int
    backbone: type[Backbone]

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, trace: Trace | None = None, **kwargs: Any
    ) -> Any:
        if trace is None:
            raise ValueError(f"layer {self.layer_index} of a compressed model was called on its own: call the model, which makes the trace")
        if trace.state is None:
            rows, tokens, _ = hidden_states.shape
            valid = self.backbone.valid_tokens(attention_mask)
            trace.begin(TokenState.initial(rows, tokens, trace.prefix, valid, hidden_states.device))
        stage = self._modules.get("stage")
        if stage is not None:
            hidden_states = stage(hidden_states, self, trace)
        assert trace.state is not None
        trace.layer_tokens[self.layer_index] = hidden_states.shape[1]
        mask = self.backbone.layer_mask(self, attention_mask, trace.state, hidden_states.dtype, **kwargs)
        return super().__call__(hidden_states, mask, *args, **kwargs)


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
        _install(self, build_stages(self, compression, self.backbone), self.backbone)
        _register_outputs(self)

    def note(self, trace: Trace | None, inputs: dict[str, Any]) -> Trace:
        """The trace of this forward: the caller's, or a new one."""
        trace = Trace() if trace is None else trace
        if trace.state is not None:
            raise ValueError("this trace has seen a forward already: make a new Trace for each forward")
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
        trace = self.note(trace, dict(zip(names, args, strict=False)) | kwargs)
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


def _install(model: PreTrainedModel, stages: list[Stage], backbone: type[Backbone]) -> None:
    by_layer = {stage.config.layer: stage for stage in stages}
    for index, layer in enumerate(backbone.layers(model)):
        plain: Any = type(layer)
        layer.__class__ = _compressed_layer_class(plain)
        assert isinstance(layer, CompressedLayer)
        layer.layer_index = index
        layer.backbone = backbone
        backbone.adopt(layer)
        if index in by_layer:
            layer.stage = by_layer[index]
    base = backbone.base(model)
    if base is not model:
        inner: Any = type(base)
        base.__class__ = compressed_class(inner)
        _register_outputs(base)


def _register_outputs(model: Any) -> None:
    """Lets transformers find what its hooks may record, which it files under the class's name."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def _empty(cls: Any) -> Any:
    compressed = compressed_class(cls) if issubclass(cls, PreTrainedModel) else _compressed_layer_class(cls)
    return object.__new__(compressed)
