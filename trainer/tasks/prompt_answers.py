"""Short answers to long prompts: a language model learns them, and is measured by how many it gives exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...data.labels.classes import KnownClasses
from ...data.text.prompt_splits import PromptData, function_prompts, hub_prompts
from ...data.text.recipe import PromptRecipe
from ...data.text.splits import TextSettings
from ...modules.tokens.labels import IGNORE_TOKEN
from ..losses.answer_loss import AnswerLoss, learned_answers
from ..losses.distillation import DistillationLoss, Taught, distillation_loss, mean, token_difference, weighted
from ..metrics.answers import predictions
from ..metrics.predictions import Predictions
from ..metrics.prompt_accuracy import PromptAccuracy
from ..metrics.quality import Quality
from ..recipe.schema import DistillationRecipe, Recipe
from .base_language_model import LanguageModel

# Tokens of an answer in a batch of noise.
_ANSWER = 8


class PromptAnswers(LanguageModel):
    """Learns the answers to prompts, one prompt a row, with any family that has a causal language model in transformers."""

    metric = "answer_accuracy"
    quality: ClassVar[type[Quality]] = PromptAccuracy
    item: ClassVar[str] = "prompts"

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig, known: KnownClasses | None = None) -> PromptData:
        data = recipe.data
        assert isinstance(data, PromptRecipe)
        settings = TextSettings(
            data.sequence_length, data.text_column, max_bad_fraction=data.max_bad_fraction, held_out=data.eval_samples, seed=recipe.seed
        )
        tokenizer_of = cls.tokenizer_of(recipe, config)
        if data.name in data.embedded:
            return function_prompts(data.train_samples, data.eval_samples, data.lengths, data.questions, tokenizer_of, settings)
        return hub_prompts(data.source, data.splits, tokenizer_of, settings)

    @classmethod
    def prompt_of(cls, row: Mapping[str, Any]) -> Tensor:
        ids: Tensor = row["input_ids"]
        # Up to the first answer, or all of a row without one.
        return ids[(row["labels"] != IGNORE_TOKEN).cumsum(0) == 0]

    @classmethod
    def noise(cls, config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
        found = super().noise(config, rows, length)
        ids: Tensor = found["input_ids"]
        # The end of a row is its answer.
        answer = torch.arange(length).expand_as(ids) >= length - min(_ANSWER, length - 1)
        labels, turns = ids.masked_fill(~answer, IGNORE_TOKEN), answer.long() - 1
        return {**found, "labels": labels, "turns": turns, "kinds": ids.new_zeros(rows, 0)}

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> AnswerLoss:
        if (trace := options.get("trace")) is not None:
            trace.labels = batch["labels"]
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return learned_answers(model, given, batch["labels"], batch["turns"], **options)

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return cls.forward(model, batch, **options).mean

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: AnswerLoss, batch: Mapping[str, Any]) -> Predictions | None:
        return predictions(out, batch["labels"])

    @classmethod
    def teach(cls, model: PreTrainedModel, batch: Mapping[str, Any], recipe: DistillationRecipe, **options: Any) -> Taught:
        found = cls.forward(model, batch, **options)
        return Taught(found.logits, found.hidden_states if recipe.hidden else None)

    @classmethod
    def learn(
        cls, model: PreTrainedModel, batch: Mapping[str, Any], taught: Taught, recipe: DistillationRecipe, **options: Any
    ) -> DistillationLoss:
        found = cls.forward(model, batch, **options)
        hidden = None if taught.tokens is None else mean(token_difference(found.hidden_states, taught.tokens))
        return weighted(recipe, found.mean, distillation_loss(found.logits, taught.answers, recipe), hidden)
