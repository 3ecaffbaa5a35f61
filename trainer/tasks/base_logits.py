"""Tasks whose model gives the logits of all labels in its output: classification and segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..losses.distillation import DistillationLoss, Taught, distillation_loss, hidden_loss, hidden_options, last_tokens, weighted
from ..metrics.predictions import Predictions
from ..recipe.schema import DistillationRecipe
from .base import Task


class LogitsTask(Task):
    """A task whose model's output has ``logits``, and ``hidden_states`` on request."""

    @classmethod
    def step(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> tuple[Tensor, Any]:
        """The loss of the labels and the output of a training forward. Arguments as in ``loss``."""
        raise NotImplementedError

    @classmethod
    def at_labels(cls, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(P, classes) logits of the places with a label, from those of an output."""
        return logits

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: Any, batch: Mapping[str, Any]) -> Predictions | None:
        return Predictions.of(out.logits, batch["labels"])

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return cls.step(model, batch, **options)[0]

    @classmethod
    def teach(cls, model: PreTrainedModel, batch: Mapping[str, Any], recipe: DistillationRecipe, **options: Any) -> Taught:
        out = cls.forward(model, batch, **options, **hidden_options(recipe))
        return Taught(cls.at_labels(out.logits, batch), last_tokens(out) if recipe.hidden else None)

    @classmethod
    def learn(
        cls, model: PreTrainedModel, batch: Mapping[str, Any], taught: Taught, recipe: DistillationRecipe, **options: Any
    ) -> DistillationLoss:
        labels, out = cls.step(model, batch, **options, **hidden_options(recipe))
        answers = distillation_loss(cls.at_labels(out.logits, batch), taught.answers, recipe)
        hidden = None if taught.tokens is None else hidden_loss(last_tokens(out), taught.tokens, options.get("trace"))
        return weighted(recipe, labels, answers, hidden)
