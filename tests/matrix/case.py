"""Case: a family and a method, and how a test makes models and inputs of them. Each kind of model has a class of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import Trace, compress
from laconic.modules.backbones import adapter_of
from laconic.modules.backbones.stack import Stack
from laconic.modules.tokens.trace import Routing

from .method import Family, Method


@dataclass(frozen=True)
class Batch:
    """Rows in one layout, and the same rows alone.

    Attributes:
        inputs: of the forward of all rows.
        alone: of the forward of each row.
        moves: tokens have other places in the batch than alone.
    """

    inputs: dict[str, Tensor]
    alone: list[dict[str, Tensor]]
    moves: bool = False


@dataclass(frozen=True)
class Case(ABC):
    """A family and a method. Rows are three where a test does not say otherwise.

    Attributes:
        layouts: in which invariant 1 gives the rows: ``whole``, ``padded``.
        usual: layout of the other invariants.
        saved: layout that a saved model is given.
        arguments: of every forward, beside its inputs.
        saved_trace: fields of the trace of a saved model's forward; empty for a forward without a trace.
        load: arguments of loading a saved model.
        generates: it generates in evaluation.
        causal: a row may keep no token.
        close: tolerances of answers of a batch against its rows alone.
        close_gradients: tolerances of gradients of two attention kernels.
    """

    family: str
    method: Method
    usual: ClassVar[str] = "whole"
    saved: ClassVar[str] = "whole"
    causal: ClassVar[bool] = False
    arguments: ClassVar[dict[str, Any]] = {}
    saved_trace: ClassVar[dict[str, Any]] = {}
    close: ClassVar[dict[str, float]] = {"atol": 2e-5, "rtol": 1e-4}
    close_gradients: ClassVar[dict[str, float]] = {"atol": 1e-4, "rtol": 1e-2}

    def __str__(self) -> str:
        return f"{self.family}-{self.method.name}"

    @property
    @abstractmethod
    def about(self) -> Family: ...

    @property
    def load(self) -> dict[str, Any]:
        return {}

    @property
    def generates(self) -> bool:
        return self.causal and self.method.deployed

    @abstractmethod
    def dense(self, **settings: Any) -> PreTrainedModel:
        """A tiny random model in evaluation mode."""

    def compressed(self, *keeps: float, **settings: Any) -> PreTrainedModel:
        """The same model, compressed, with scores that differ."""
        return self.spread(compress(self.dense(**settings), self.method.config(*keeps)))

    def spread(self, model: PreTrainedModel) -> PreTrainedModel:
        return spread(model)

    def neutral(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same, with parts that are no identity at keep 1 as they are at first."""
        return model

    @abstractmethod
    def inputs(self, layout: str = "", seed: int = 0) -> dict[str, Tensor]:
        """Of one forward, in the usual layout where none is given."""

    @abstractmethod
    def lengths(self) -> Tensor:
        """(B,) int64 tokens of each row in the usual layout, protected ones included."""

    @abstractmethod
    def batches(self) -> list[Batch]:
        """The layouts in which a batch must equal its rows alone."""

    @abstractmethod
    def tied(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with a second row in which the tokens are alike."""

    def labels(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.arange(len(next(iter(inputs.values())))) % 5

    def answer(self, outputs: Any) -> Tensor:
        logits: Tensor = outputs.logits
        return logits

    def run(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], **kwargs: Any) -> Any:
        return model(**inputs, **{**self.arguments, **kwargs})

    def loss(self, model: PreTrainedModel, inputs: dict[str, Tensor], trace: Trace | None = None) -> Tensor:
        """Loss of a training forward, without auxiliary losses. The trace is given the labels; a dense model has none."""
        if trace is not None:
            trace.labels = self.labels(inputs)
        given = {} if trace is None else {"trace": trace}
        loss: Tensor = self.run(model, inputs, labels=self.labels(inputs), **given).loss
        return loss

    def traced(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], **given: Any) -> tuple[Tensor, Trace]:
        """Answer and trace of one forward; ``given`` goes to the trace."""
        trace = Trace(**({} if self.method.deployed else {"lookahead": True}) | given)
        return self.answer(self.run(model, inputs, trace=trace)), trace

    @abstractmethod
    def reference(self, model: PreTrainedModel, plain: PreTrainedModel, trace: Trace) -> Tensor:
        """Answer of a forward of the whole rows in which the dense model, which may be changed, computes every token in every layer."""

    @abstractmethod
    def exact(self, training: bool, padded: bool) -> bool:
        """At keep 1 it is the dense model bit for bit."""

    def tokens_of(self, answer: Tensor, row: int, inputs: dict[str, Tensor]) -> Tensor:
        """The answer for a row, without that for padding."""
        return answer[row]

    def kept_of(self, routing: Routing, row: int, inputs: dict[str, Tensor]) -> Tensor:
        """Which tokens of a row a stage kept: original places, since a batch has more padding, in front of a fused token too."""
        index, valid = routing.decision.index[row], routing.decision.valid
        return routing.state.position[row][index if valid is None else index[valid[row]]]


def spread(model: PreTrainedModel, seed: int = 2, std: float = 0.5) -> PreTrainedModel:
    """Scores of fresh parts are nearly equal; spread them, so that decisions mean something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stages." in name and parameter.ndim > 1:
                parameter.normal_(0, std)
        settle(model)
    return model


def settle(model: PreTrainedModel) -> None:
    """Thresholds as if they had followed the scores to 0; one that has seen none lets the top k stay."""
    for name, buffer in model.named_buffers():
        if name.endswith("selector.batches"):
            buffer.fill_(1)


def stack_of(model: PreTrainedModel) -> Stack:
    """The first stack of a model, dense or compressed: its layers and their adapter."""
    return adapter_of(model).main_stack(model)


def traced_outputs(
    model: PreTrainedModel, inputs: Mapping[str, Any], given: dict[str, Any], own: tuple[str, ...] = ()
) -> tuple[Any, Trace]:
    """Outputs and trace of one forward. Of ``given``, what Trace knows goes to it, but for ``own``, which the model is given."""
    known = set(Trace.__dataclass_fields__) - set(own)
    trace = Trace(**{key: value for key, value in given.items() if key in known})
    return model(**inputs, trace=trace, **{key: value for key, value in given.items() if key not in known}), trace
