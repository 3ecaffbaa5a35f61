"""ModelAdapter: stacks, inputs, outputs and heads of one family of models. Adapters are used as classes, without instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..cost.shape import StackShape
from ..site import TokenSpec
from ..tokens.trace import Trace
from .layer_adapter import LayerAdapter
from .stack import Stack


class ModelAdapter:
    """One family of models: its stacks of layers, the inputs of a forward and its outputs.

    Attributes:
        model_type: the family's ``config.model_type``; a class without one is a shared base class, not an adapter.
        stack_name: name of the first stack: "" unless the models are composite.
        layer_adapter: adapter of the first stack's layers, in a family in which all models have the same kind of layers.
        layers_at: name of the first stack's list of layers in ``base(model)``, with dots.
        classes: names of the supported model classes.
        refused: names of the family's unsupported model classes, with the reason.
        refused_stacks: names of stacks whose layers do not support stages, with the reason and what works instead.
        takes_attention_mask: the models' forward accepts an ``attention_mask`` for padded rows.
    """

    model_type: ClassVar[str]
    stack_name: ClassVar[str] = ""
    layer_adapter: ClassVar[type[LayerAdapter]]
    layers_at: ClassVar[str] = "layers"
    classes: ClassVar[tuple[str, ...]]
    refused: ClassVar[Mapping[str, str]] = {}
    refused_stacks: ClassVar[Mapping[str, str]] = {}
    takes_attention_mask: ClassVar[bool] = True

    @classmethod
    def base(cls, model: PreTrainedModel) -> nn.Module:
        """The model without its task head."""
        return getattr(model, model.base_model_prefix, model)

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        """Raises ValueError, with the cure, if this model cannot be compressed. Called before the model is changed."""

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        """The transformer layers of the first stack, in order."""
        layers = cls.base(model).get_submodule(cls.layers_at)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        """The stacks of the model, in running order."""
        return (Stack(cls.stack_name, cls.layers(model), cls.layers_adapter(model.config), cls.stack_config(model.config)),)

    @classmethod
    def layers_adapter(cls, config: Any) -> type[LayerAdapter]:
        """Adapter of the first stack's layers, for a model's config."""
        return cls.layer_adapter

    @classmethod
    def stack_config(cls, config: Any) -> PretrainedConfig:
        """Configuration of the first stack's layers."""
        settings: PretrainedConfig = config
        return settings

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
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        """The outputs of a forward, corrected if a head read padding because rows leave the layers with different lengths."""
        return outputs

    @classmethod
    def head_counts_places(cls, model: PreTrainedModel) -> bool:
        """True if the head needs a token at every position of the input, however many are kept; ``finish`` provides them."""
        return False
