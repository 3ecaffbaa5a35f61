"""What a model adapter says of one family of models: stacks of layers, inputs, outputs, heads. Stateless, used as a class."""

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
    """One family of models: where its stacks are, what a forward is given and what comes out of it.

    Attributes:
        model_type: the family's ``config.model_type``; a class without one is shared by families and no adapter itself.
        layer_adapter: of the layers, in a family of one stack.
        classes: class names of the models it serves.
        refused: class names of the family that cannot be served, and why.
        takes_attention_mask: the models' forward understands an ``attention_mask`` for padded rows.
    """

    model_type: ClassVar[str]
    layer_adapter: ClassVar[type[LayerAdapter]]
    classes: ClassVar[tuple[str, ...]]
    refused: ClassVar[Mapping[str, str]] = {}
    takes_attention_mask: ClassVar[bool] = True

    @classmethod
    def base(cls, model: PreTrainedModel) -> nn.Module:
        """The model without its task head."""
        return getattr(model, model.base_model_prefix, model)

    @classmethod
    def check(cls, model: PreTrainedModel) -> None:
        """Raises ValueError, with the cure, where this very model cannot be compressed. Called before anything is changed."""

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        """The transformer layers of the first stack, in order."""
        layers = cls.base(model).layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @classmethod
    def stacks(cls, model: PreTrainedModel) -> tuple[Stack, ...]:
        """The runs of layers that stages may sit in, in the order that they run."""
        return (Stack("", cls.layers(model), cls.layer_adapter, cls.stack_config(model.config)),)

    @classmethod
    def stack_config(cls, config: Any) -> PretrainedConfig:
        """Settings of the first stack's layers."""
        settings: PretrainedConfig = config
        return settings

    @classmethod
    def set_attention(cls, model: PreTrainedModel, stack: Stack, implementation: str) -> None:
        """Makes the layers of one stack run an attention implementation."""
        model.set_attn_implementation(implementation)

    @classmethod
    def token_spec(cls, model: PreTrainedModel, stack: Stack) -> TokenSpec:
        """What parts of a stack's stages are built for."""
        return TokenSpec(hidden_size=stack.config.hidden_size, classes=model.config.num_labels or 0, family=cls.model_type)

    @classmethod
    def every_token(cls, model: PreTrainedModel, stack: Stack) -> str | None:
        """What reads every token that leaves a stack, so that a stage which shortens it needs a restore; None where nothing does."""
        return None

    @classmethod
    def shapes(cls, model: PreTrainedModel, size: tuple[int, int] | int | None = None) -> dict[str, StackShape]:
        """What the cost of this model depends on, by stack.

        Args:
            model: dense or compressed.
            size: of the input, height and width in pixels or tokens of a text; None takes the configured size.
        """
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
    def labels(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
        """Labels for the trace of a forward whose caller made none; None where estimators could not learn from the model's."""
        labels = inputs.get("labels")
        return labels if isinstance(labels, Tensor) else None

    @classmethod
    def bind_inputs(cls, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        """Notes on the flows what layers and parts need to know of the model's inputs."""
        flow = trace.flow()
        flow.leading, flow.protected = cls.layer_adapter.leading(cls.stack_config(model.config)), trace.protected

    @classmethod
    def finish(cls, model: PreTrainedModel, outputs: Any, trace: Trace) -> Any:
        """The outputs of a forward, made right where a head read padding: rows may leave the layers with different counts."""
        return outputs

    @classmethod
    def head_counts_places(cls, model: PreTrainedModel) -> bool:
        """The head needs a token for every place of the input, however many are left; ``finish`` provides them."""
        return False
