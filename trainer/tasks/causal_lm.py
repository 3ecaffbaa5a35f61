"""Causal language modelling: pretraining on text, and fine-tuning on answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...data.labels.classes import KnownClasses
from ...data.text.recipe import DocumentRecipe
from ...data.text.splits import TextData, TextSettings, hub_text, python_functions, python_library, streamed_text
from ...modules.tokens.labels import IGNORE_TOKEN
from ..losses.bags import read_bags
from ..losses.distillation import DistillationLoss, Taught, divergence, token_difference, weighted
from ..losses.token_loss import Read, TokenLoss, logits_of, loss_of, read
from ..metrics.perplexity import Perplexity
from ..metrics.predictions import PredictionLog, Predictions
from ..metrics.quality import Quality
from ..recipe.schema import DistillationRecipe, Recipe
from .base_language_model import LanguageModel

# Tokens whose logits are in memory at once when predictions are compared.
_PART = 256
EMBEDDED = {"python_library": python_library, "python_functions": python_functions}


class CausalLM(LanguageModel):
    """Predicts the next token, with any family that has a causal language model in transformers."""

    metric = "perplexity"
    higher_is_better = False
    quality: ClassVar[type[Quality]] = Perplexity
    item: ClassVar[str] = "rows"

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig, known: KnownClasses | None = None) -> TextData:
        data = recipe.data
        assert isinstance(data, DocumentRecipe)
        settings = TextSettings(
            data.sequence_length, data.text_column, data.sample_by, data.max_bad_fraction, data.eval_samples, recipe.seed
        )
        tokenizer_of = cls.tokenizer_of(recipe, config)
        if data.name in EMBEDDED:
            return EMBEDDED[data.name](data.train_samples, data.eval_samples, tokenizer_of, settings)
        opened = streamed_text if data.streaming else hub_text
        return opened(data.source, data.splits, tokenizer_of, settings)

    @classmethod
    def prompt_of(cls, row: Mapping[str, Any]) -> Tensor:
        ids: Tensor = row["input_ids"][row["documents"] == 0]
        return ids

    @classmethod
    def noise(cls, config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
        found = super().noise(config, rows, length)
        ids: Tensor = found["input_ids"]
        # Every row is one document.
        places = {"position_ids": torch.arange(length).expand(rows, -1), "documents": torch.zeros_like(ids)}
        return {**found, **places, "labels": ids, "bytes": 0}

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return cls.forward(model, batch, **options).mean

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> TokenLoss:
        return loss_of(model, cls._read(model, batch, **options))

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: TokenLoss, batch: Mapping[str, Any]) -> Predictions | None:
        assert out.found is not None
        counted = out.found.following != IGNORE_TOKEN
        read, following = out.found.hidden_states[counted], out.found.following[counted]
        log = PredictionLog(limit=len(following))
        for states, labels in zip(read.split(_PART), following.split(_PART), strict=True):
            log.add(Predictions.of(logits_of(model, states), labels))
        return log.whole

    @classmethod
    def _read(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Read:
        if batch["input_ids"].ndim == 3:
            # Rows of bags, in a phase of training.
            return read_bags(model, batch["input_ids"], batch["labels"], batch["position_ids"])
        documents = _apart(batch["documents"])
        # Positions from 0 on are the model's own, and that there is no packing must be known without asking the device.
        places = None if documents is None else batch["position_ids"]
        return read(model, batch["input_ids"], batch["labels"], places, documents, **options)

    @classmethod
    def teach(cls, model: PreTrainedModel, batch: Mapping[str, Any], recipe: DistillationRecipe, **options: Any) -> Taught:
        found = cls._read(model, batch, **options).hidden_states
        return Taught(found, found if recipe.hidden else None)

    @classmethod
    def learn(
        cls, model: PreTrainedModel, batch: Mapping[str, Any], taught: Taught, recipe: DistillationRecipe, **options: Any
    ) -> DistillationLoss:
        found = cls._read(model, batch, **options)
        apart = partial(divergence, temperature=recipe.temperature, reverse=recipe.reverse)
        loss = loss_of(model, found, taught.answers, apart)
        number, hidden = loss.count.clamp(min=1), None
        if taught.tokens is not None:
            difference = token_difference(found.hidden_states, taught.tokens)
            hidden = difference.masked_fill(found.following == IGNORE_TOKEN, 0.0).sum() / number
        assert loss.apart is not None
        return weighted(recipe, loss.mean, loss.apart / number, hidden)


def _apart(documents: Tensor) -> Tensor | None:
    """The documents of a batch; None if every row is one document without padding, because attention then needs no mask."""
    return documents if bool((documents != 0).any()) else None
