"""ModelAdapter: stacks, inputs, outputs and heads of one family of models. Adapters are used as classes, without instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import COMPLETE, CompressionConfig, RestoreConfig
from ..cost.shape import StackShape
from ..rules.depth import check_depth
from ..rules.protected import SINKS
from ..site import TokenSpec
from ..tokens.trace import Trace
from .layer_adapter import LayerAdapter
from .stack import Stack


class ModelAdapter:
    """One family of models: its stacks of layers, the inputs of a forward and its outputs.

    Attributes:
        model_type: the family's ``config.model_type``; a class without one is a shared base class, not an adapter.
        stack_name: name of the main stack: "" unless the models are composite.
        feeds: in a composite model, the stack that the tokens leaving a stack enter, by name.
        parts_at: in a composite model, names of the modules and parameters in ``base(model)`` of every part but the main one, by its name.
        layer_adapter: adapter of the main stack's layers, in a family in which all models have the same kind of layers.
        layers_at: name of the main stack's list of layers in ``base(model)``, with dots.
        classes: names of the supported model classes.
        refused: names of the family's unsupported model classes, with the reason.
        tower_at: name of the vision tower in ``base(model)``, with dots; None in a family without one beside its layers.
        takes_attention_mask: the models' forward accepts an ``attention_mask`` for padded rows.
    """

    model_type: ClassVar[str]
    stack_name: ClassVar[str] = ""
    feeds: ClassVar[Mapping[str, str]] = {}
    parts_at: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    layer_adapter: ClassVar[type[LayerAdapter]]
    layers_at: ClassVar[str] = "layers"
    classes: ClassVar[tuple[str, ...]]
    refused: ClassVar[Mapping[str, str]] = {}
    tower_at: ClassVar[str | None] = None
    takes_attention_mask: ClassVar[bool] = True

    @classmethod
    def base(cls, model: PreTrainedModel) -> nn.Module:
        """The model without its task head."""
        return getattr(model, model.base_model_prefix, model)

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        """Raises ValueError, with the cure, if this model cannot be compressed. Called before the model is changed."""

    @classmethod
    def check_stages(cls, model: PreTrainedModel, config: CompressionConfig) -> None:
        """Raises ValueError, with the cure, if this model cannot have stages in these stacks, or at these layers."""

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        """The transformer layers of the main stack, in order."""
        layers = cls.base(model).get_submodule(cls.layers_at)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        """The stacks of the model, in running order."""
        return (cls.main_stack(model),)

    @classmethod
    def main_stack(cls, model: PreTrainedModel) -> Stack:
        """The stack that the head reads from, in a composite model that of the language model."""
        return Stack(cls.stack_name, cls.layers(model), cls.layers_adapter(model.config), cls.stack_config(model.config))

    @classmethod
    def layers_adapter(cls, config: Any) -> type[LayerAdapter]:
        """Adapter of the main stack's layers, for a model's config."""
        return cls.layer_adapter

    @classmethod
    def stack_config(cls, config: Any) -> PretrainedConfig:
        """Configuration of the main stack's layers."""
        settings: PretrainedConfig = config
        return settings

    @classmethod
    def parts(cls, model: PreTrainedModel) -> dict[str, str]:
        """Part of the model that each parameter belongs to, by the parameter's name: ``stack_name`` for the main stack, embeddings and head."""
        base = cls.base(model)
        before = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
        # Parts may lie in one another, the merger in the tower of a Qwen2-VL: the longest name decides.
        places = sorted(((f"{before}{place}", part) for part, own in cls.parts_at.items() for place in own), key=lambda at: -len(at[0]))
        return {
            name: next((part for place, part in places if name == place or name.startswith(f"{place}.")), cls.stack_name)
            for name, _ in model.named_parameters()
        }

    @classmethod
    def set_attention(cls, model: PreTrainedModel, stack: Stack, implementation: str) -> None:
        """Sets the attention implementation of one stack's layers."""
        model.set_attn_implementation(implementation)

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        """The TokenSpec for the parts of a stack's stages."""
        return TokenSpec(hidden_size=stack.config.hidden_size, classes=model.config.num_labels or 0, family=cls.model_type)

    @classmethod
    def every_token(cls, model: PreTrainedModel, stack: Stack) -> str | None:
        """Name of the consumer that reads every token leaving the stack, so that shrinking needs a restore; None if there is none."""
        return None

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        """StackShape for the cost model, by stack.

        Args:
            model: dense or compressed model.
            size: input size, (height, width) in pixels or a number of text tokens; None means the configured size.
        """
        raise NotImplementedError

    @classmethod
    def added_inputs(cls, model: PreTrainedModel, trace: Trace | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs that the adapter adds to a forward or replaces in it.

        Args:
            model: the compressed model.
            trace: the caller's trace; None without one.
            inputs: inputs of the forward, by name.
        """
        return {}

    @classmethod
    def labels(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
        """Labels for a trace that the model creates itself; None if estimators cannot use the model's labels."""
        labels = inputs.get("labels")
        return labels if isinstance(labels, Tensor) else None

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        """Stores on the flows the inputs that layers and parts need."""
        flow = trace.flow(cls.stack_name)
        flow.leading = cls.layers_adapter(model.config).leading(cls.stack_config(model.config))
        flow.protected = trace.protected

    @classmethod
    def encode(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs earlier stacks of a composite model before the model's own forward, and returns the inputs that replace theirs.

        Args:
            model: the compressed model, or its base.
            trace: the trace of the forward, with the inputs on its flows.
            inputs: inputs of the forward, by name.
        """
        return {}

    @classmethod
    def encoded_images(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """``mm_encoder_outputs`` for ``generate``, which computes them before the first forward; None leaves them to transformers.

        Args:
            model: the compressed model.
            inputs: keyword arguments of ``generate``.
        """
        return None

    @classmethod
    def begins_short(cls, stack: str, config: CompressionConfig) -> bool:
        """True if stages in earlier stacks remove tokens of a stack."""
        before = [name for name, fed in cls.feeds.items() if fed == stack]
        return any(any(not stage.bypass for stage in config.of_stack(name)) or cls.begins_short(name, config) for name in before)

    @classmethod
    def depths(cls, config: PretrainedConfig) -> dict[str, int]:
        """Number of layers of each stack that supports stages, for a model's config."""
        settings: Any = cls.stack_config(config)
        return {cls.stack_name: settings.num_hidden_layers}

    @classmethod
    def resolved(cls, compression: CompressionConfig, config: PretrainedConfig) -> CompressionConfig:
        """Stages with indices of layers in place of fractions, and with the protected tokens and the restore of causal models that are
        not given.

        Where prompt or visual tokens are removed, or a stack before the language model removed them, only a restore by ``rejoin`` after
        the last layer is possible.

        Args:
            compression: stages of a config or recipe.
            config: config of the model.

        Raises:
            ValueError: stages that are given relative to the depth do not fit into it.
        """
        depths = cls.depths(config)
        for stack, depth in depths.items():
            relative: dict[str, list[float | str]] = {}
            for stage in compression.of_stack(stack):
                if not isinstance(stage.layer, int):
                    relative.setdefault(stage.site, []).append(stage.layer)
            check_depth(relative, depth, stack)
        # Stages of unknown stacks stay as they are, to be refused by name.
        stages = [
            one for given in compression.stages for one in (given.at_depth(depths[given.stack]) if given.stack in depths else [given])
        ]
        main, causal = cls.stack_name, cls.layers_adapter(config).causal
        # Visual tokens stand behind the first one, and no text is in their scope.
        stages = [
            replace(stage, protect=dict(SINKS))
            if stage.protect is None and causal and stage.stack == main and stage.treats_some and stage.scope != "visual"
            else stage
            for stage in stages
        ]
        compression = compression.with_stages(stages)
        shortened = any(not stage.bypass and stage.scope in COMPLETE for stage in compression.of_stack(main))
        if main in compression.restores or not causal or not (shortened or cls.begins_short(main, compression)):
            return compression
        return compression.with_restores({**compression.restores, main: RestoreConfig(depths[main], "rejoin")})

    @classmethod
    def rows_ratio(cls, trace: Trace, stack: str) -> float:
        """Rows of a stack for each row of the model in a forward: images a row, for the tower of a vision-language model."""
        return 1.0

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        """The outputs of a forward, corrected if a head read padding because rows leave the layers with different lengths."""
        return outputs

    @classmethod
    def head_counts_places(cls, model: PreTrainedModel) -> bool:
        """True if the head needs a token at every position of the input, however many are kept; ``finish`` or a restore provides them."""
        return False

    @classmethod
    def whole_until(cls, model: PreTrainedModel) -> int:
        """Index of the first layer of the main stack that the model lets have fewer tokens than the input has places."""
        return 0
