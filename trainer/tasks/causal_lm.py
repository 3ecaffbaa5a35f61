"""Causal language modelling: pretraining on text, and fine-tuning on answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...data.hub import DataSource
from ...data.splits import Splits
from ...data.text.splits import TextData, TextSettings, hub_text, python_functions, python_library, streamed_text
from ...data.text.tokenizer import load_tokenizer, trained_tokenizer
from ..build.initial_weights import start_of
from ..build.parts import RunParts
from ..distributed import collective
from ..losses.token_loss import TokenLoss, check_model, token_loss
from ..metrics.perplexity import Perplexity
from ..metrics.quality import Quality
from ..recipe.schema import IMAGE_KEYS, DataRecipe, ModelRecipe, Recipe
from ..run_folder import TOKENIZER, RunFolder
from ..show.inspection import inspect_text
from ..task_module import TaskModule
from .base import PROBES, Task, refuse_data_keys

EMBEDDED = {"python_library": python_library, "python_functions": python_functions}
_PROBE_TOKENS = 32


class CausalLMModule(TaskModule):
    """Trains a language model; the loss of a step is the mean over the predicted tokens of all ranks."""

    def on_fit_start(self) -> None:
        # Stages may need what only a real batch has; families that can have them are known.
        if not hasattr(self.model.config, "compression"):
            check_model(self.model)

    def losses(self, batch: dict[str, Any]) -> dict[str, Any]:
        trace = self.training_trace(batch)
        mean = self.task.loss(self.model, batch, **self.with_trace(trace))
        # Ranks predict different numbers of tokens, and averaging their gradients must give that of the mean over all tokens.
        predicted = collective.total([batch["predicted"]])[0] / collective.world_size()
        loss = mean * (batch["predicted"] / max(1.0, predicted))
        return self.total(loss, loss, trace)


class CausalLM(Task):
    """Predicts the next token; any family that transformers has a causal language model of."""

    metric = "perplexity"
    higher_is_better = False
    quality: ClassVar[type[Quality]] = Perplexity
    controls: ClassVar[tuple[str, ...]] = ("random", "uniform_grid")
    unit: ClassVar[str] = "tokens"
    item: ClassVar[str] = "rows"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        refuse_data_keys(recipe, IMAGE_KEYS, "is for images, and task = causal_lm has text: leave it out")
        refuse_data_keys(recipe, ("second_text_column",), "is for task = text_classification: give columns prompt and completion")
        if recipe.distillation is not None:
            raise ValueError("distillation has an image classifier for a teacher, and task = causal_lm has text: leave it out")
        if recipe.model.encoder_of is not None:
            raise ValueError("model.encoder_of is for images, and task = causal_lm has text: give model.name or model.config")
        if recipe.data.name in ("scattered_digits", "imagefolder"):
            raise ValueError(
                f"data.name = {recipe.data.name!r} holds images, and task = causal_lm has text: give {', '.join(EMBEDDED)}, text, json, parquet, csv or a hub name"
            )
        if recipe.data.streaming and recipe.data.name in EMBEDDED:
            raise ValueError(f"data.streaming = true: {recipe.data.name} is on this machine and small, leave data.streaming out")
        if recipe.data.sample_by != "document" and recipe.data.name != "text":
            raise ValueError(f"data.sample_by = {recipe.data.sample_by!r} cuts files of data.name = 'text', and it is {recipe.data.name!r}")

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        # Another version of Python has other files to train a tokenizer on: that of the weights stays with them.
        folder = run.with_file(TOKENIZER)
        if folder is None:
            return recipe
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(folder)})})

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                f"{model_type} has no causal language model in transformers: take llama, qwen3, gemma3_text or gpt2, for example"
            )
        model: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        return model

    @classmethod
    def loaded_model(cls, recipe: ModelRecipe, config: PretrainedConfig, **options: Any) -> Any:
        asked = options.pop("output_loading_info", False)
        model, report = cls.model_class(config.model_type).from_pretrained(
            recipe.name,
            revision=recipe.revision,
            config=config,
            attn_implementation=recipe.attention,
            # Whatever the checkpoint was saved in: trainer.precision decides what is computed in bf16.
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(map(str, report["missing_keys"])):
            raise ValueError(f"model.name = {recipe.name!r} lacks the weights {', '.join(missing[:3])}: it is no causal language model")
        return (model, report) if asked else model

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig) -> TextData:
        data = recipe.data
        settings = TextSettings(
            data.sequence_length, data.text_column, data.sample_by, data.max_bad_fraction, data.eval_samples, recipe.seed
        )

        def tokenizer_of(texts: Iterable[str] | None) -> Any:
            if data.tokenizer is not None:
                return load_tokenizer(data.tokenizer)
            if (start := start_of(recipe.model)) is not None:
                return load_tokenizer(*start.beside(TOKENIZER))
            if texts is None:
                raise ValueError("data.tokenizer is missing: a tokenizer is trained on plain texts only, and these rows have prompts")
            size: int = config.get_text_config().vocab_size
            return trained_tokenizer(texts, size)

        if data.name in EMBEDDED:
            return EMBEDDED[data.name](data.train_samples, data.eval_samples, tokenizer_of, settings)
        if data.name in ("text", "json", "parquet", "csv") and data.data_files is None and data.data_dir is None:
            raise ValueError(f"data.name = {data.name!r} needs data.data_files or data.data_dir")
        splits = text_source(data), data.train_split, data.validation_split, data.test_split
        if data.streaming:
            return streamed_text(*splits, tokenizer_of, settings)
        return hub_text(*splits, data.validation_fraction, tokenizer_of, settings)

    @classmethod
    def size(cls, recipe: Recipe) -> int:
        return recipe.data.sequence_length

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        assert isinstance(data, TextData)
        inner: Any = config.get_text_config()
        entries = len(data.tokenizer)
        if inner.vocab_size < entries:
            raise ValueError(
                f"the tokenizer has {entries} entries and the model {inner.vocab_size}: set model.config.vocab_size={entries} or more, "
                "or data.tokenizer to the model's own"
            )
        longest = getattr(inner, "max_position_embeddings", None)
        if longest is not None and longest < data.length:
            raise ValueError(f"data.sequence_length = {data.length} is more than the model's max_position_embeddings = {longest}: lower it")
        if not config.name_or_path:
            # A new model stops where its tokenizer ends a text, not where the family's usual one would.
            config.bos_token_id, config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
            config.pad_token_id = data.tokenizer.pad_token_id

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return CausalLMModule(cls, parts)

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        if to.suffix != ".html":
            raise ValueError(f"--to {to}: kept tokens of a text are an .html page")
        data = cls.open_data(recipe, model.config)
        if given is None:
            row = data.test[0]
            text = data.tokenizer.decode(row["input_ids"][row["documents"] == 0])
        else:
            # A long text is no name of a file, and the system says so in its own way.
            path = Path(given) if len(given) < 255 and "\n" not in given else None
            text = path.read_text("utf-8", "replace") if path is not None and path.is_file() else given
        return inspect_text(model, data.tokenizer, text, data.length, f"{target}: tokens by stage", to)

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        tokens: int = batch["tokens"]
        return tokens

    @classmethod
    def compile(cls, model: PreTrainedModel) -> None:
        # The loss calls the base model, and the head part by part.
        model.base_model.compile()

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return cls.forward(model, batch, **options).mean

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> TokenLoss:
        return token_loss(model, batch["input_ids"], batch["labels"], batch["position_ids"], _apart(batch["documents"]), **options)

    @classmethod
    def probe(cls, config: PretrainedConfig) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"input_ids": torch.randint(config.get_text_config().vocab_size, (PROBES, _PROBE_TOKENS), generator=generator)}


def _apart(documents: Tensor) -> Tensor | None:
    """The documents of a batch; None where every row is one and has no filler, since attention then needs no mask."""
    return documents if bool((documents != 0).any()) else None


def text_source(recipe: DataRecipe) -> DataSource:
    """Where a recipe's texts come from."""
    return DataSource(recipe.name, recipe.data_dir, recipe.data_files, recipe.config, recipe.revision)
