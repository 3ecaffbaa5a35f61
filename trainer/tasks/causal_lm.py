"""Causal language modelling: pretraining on text, and fine-tuning on answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...data.labels.classes import KnownClasses
from ...data.splits import Splits
from ...data.text.recipe import DocumentRecipe
from ...data.text.splits import TextData, TextSettings, hub_text, python_functions, python_library, streamed_text
from ...data.text.tokenizer import with_template
from ...modules.tokens.labels import IGNORE_TOKEN
from ..build.parts import RunParts
from ..losses.distillation import DistillationLoss, Taught, divergence, token_difference, weighted
from ..losses.token_loss import Read, TokenLoss, check_model, loss_of, read
from ..metrics.perplexity import Perplexity
from ..metrics.quality import Quality
from ..recipe.schema import DistillationRecipe, ModelRecipe, Recipe
from ..run_folder import RunFolder
from ..task_module import TaskModule
from .base import whole_weights
from .base_text import TextTask

EMBEDDED = {"python_library": python_library, "python_functions": python_functions}


class CausalLMModule(TaskModule):
    """Trains a language model."""

    def on_fit_start(self) -> None:
        # Compressed models are skipped: stages may need a real batch, and only supported families can have them.
        if not hasattr(self.model.config, "compression"):
            check_model(self.model)


class CausalLM(TextTask):
    """Predicts the next token, with any family that has a causal language model in transformers."""

    metric = "perplexity"
    higher_is_better = False
    quality: ClassVar[type[Quality]] = Perplexity
    item: ClassVar[str] = "rows"

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                f"{model_type} has no causal language model in transformers: use llama, qwen3, gemma3_text or gpt2, for example"
            )
        model: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        return model

    @classmethod
    def loaded_model(cls, recipe: ModelRecipe, config: PretrainedConfig, **options: Any) -> Any:
        return whole_weights(cls.model_class(config.model_type), recipe, config, "not a causal language model", **options)

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        found = super().of_run(recipe, run)
        # The tokenizer of the run has the template already, and its file may be gone.
        return found if found is recipe else found.model_copy(update={"data": found.data.model_copy(update={"chat_template": None})})

    @classmethod
    def tokenizer_of(cls, recipe: Recipe, config: PretrainedConfig) -> Callable[[Iterable[str] | None], Any]:
        tokenizer, data = super().tokenizer_of(recipe, config), recipe.data
        assert isinstance(data, DocumentRecipe)
        template = data.chat_template
        return tokenizer if template is None else lambda texts: with_template(tokenizer(texts), template)

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
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        super().fit_config(config, data)
        assert isinstance(data, TextData)
        if not config.name_or_path:
            # A new model uses the special tokens of its tokenizer instead of the family's default ones.
            config.bos_token_id, config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
            config.pad_token_id = data.tokenizer.pad_token_id

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return CausalLMModule(cls, parts)

    @classmethod
    def held_out(cls, data: TextData) -> str:
        row = data.test[0]
        text: str = data.tokenizer.decode(row["input_ids"][row["documents"] == 0])
        return text

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        tokens: int = batch["tokens"]
        return tokens

    @classmethod
    def compile(cls, model: PreTrainedModel) -> None:
        # The loss calls the base model and the head separately.
        model.base_model.compile()

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return cls.forward(model, batch, **options).mean

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> TokenLoss:
        return loss_of(model, cls._read(model, batch, **options))

    @classmethod
    def _read(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Read:
        return read(model, batch["input_ids"], batch["labels"], batch["position_ids"], _apart(batch["documents"]), **options)

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
