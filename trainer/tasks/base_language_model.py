"""The shared parts of tasks of causal language models: model class, tokenizer and its chat template, special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...data.splits import Splits
from ...data.text.recipe import DocumentRecipe, PromptRecipe
from ...data.text.splits import TextData
from ...data.text.tokenizer import with_template
from ..build.parts import RunParts
from ..losses.bags import check_reads_embeddings
from ..losses.token_loss import check_model
from ..recipe.schema import ModelRecipe, Recipe
from ..run_folder import RunFolder
from ..task_module import TaskModule
from .base_text import TextTask
from .base_weights import whole_weights


class LanguageModelModule(TaskModule):
    """Trains a language model."""

    def on_fit_start(self) -> None:
        # Compressed models are skipped: stages may need a real batch, and only supported families can have them.
        if not hasattr(self.model.config, "compression"):
            check_model(self.model)
        if self.phases is not None and any(phase.bag is not None for phase in self.phases.phases):
            check_reads_embeddings(self.model)


class LanguageModel(TextTask):
    """A task of any family that has a causal language model in transformers."""

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
        assert isinstance(data, DocumentRecipe | PromptRecipe)
        template = data.chat_template
        return tokenizer if template is None else lambda texts: with_template(tokenizer(texts), template)

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
        return LanguageModelModule(cls, parts)

    @classmethod
    def prompt_of(cls, row: Mapping[str, Any]) -> Tensor:
        """Token ids (n,) of the prompt of a held-out row, or of the text in its place."""
        raise NotImplementedError

    @classmethod
    def held_out(cls, data: Any) -> str:
        text: str = data.tokenizer.decode(cls.prompt_of(data.test[0]))
        return text

    @classmethod
    def prompts(cls, data: Any, number: int) -> list[Tensor]:
        found = [cls.prompt_of(data.test[index]) for index in range(min(len(data.test), 8 * number))]
        return sorted(found, key=len)[-number:]

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        tokens: int = batch["tokens"]
        return tokens

    @classmethod
    def compile(cls, model: PreTrainedModel) -> None:
        # The loss calls the base model and the head separately.
        model.base_model.compile()
