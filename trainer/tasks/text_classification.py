"""Classification of texts, or of pairs of them, by an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ...data.splits import Splits
from ...data.text.labelled import Columns, LabelledText, hub_labelled_text, passages
from ...data.text.tokenizer import load_tokenizer, trained_tokenizer
from ...modules.backbones import backbone_for, backbones
from ..build.initial_weights import start_of
from ..build.parts import RunParts
from ..metrics.accuracy import Accuracy
from ..metrics.quality import Quality
from ..recipe.schema import IMAGE_KEYS, Recipe
from ..run_folder import TOKENIZER, RunFolder
from ..show.inspection import inspect_text
from ..task_module import TaskModule
from .base import PROBES, Task, refuse_data_keys
from .causal_lm import text_source

EMBEDDED = "python_passages"
_PROBE_TOKENS = 32


class TextClassification(Task):
    """One label a text; any family that transformers has a sequence classifier of, with stages where it has an adapter."""

    metric = "accuracy"
    quality: ClassVar[type[Quality]] = Accuracy
    unit: ClassVar[str] = "tokens"
    item: ClassVar[str] = "texts"
    controls: ClassVar[tuple[str, ...]] = ("random", "uniform_grid")

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        images = [key for key in IMAGE_KEYS if key not in ("label_column", "num_labels")]
        refuse_data_keys(recipe, images, "is for images, and task = text_classification has text: leave it out")
        refuse_data_keys(recipe, ("sample_by", "streaming"), "is for task = causal_lm: leave it out")
        if recipe.distillation is not None:
            raise ValueError("distillation has an image classifier for a teacher, and task = text_classification has text: leave it out")
        if recipe.model.encoder_of is not None:
            raise ValueError("model.encoder_of is for images, and task = text_classification has text: give model.name or model.config")
        name = recipe.data.name
        if name in ("scattered_digits", "imagefolder", "python_library", "text"):
            holds = "images" if name in ("scattered_digits", "imagefolder") else "texts without labels"
            raise ValueError(f"data.name = {name!r} holds {holds}: give {EMBEDDED}, json, csv, parquet or a hub name")

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        # Another version of Python has other files to train a tokenizer on: that of the weights stays with them.
        folder = run.with_file(TOKENIZER)
        if folder is None:
            return recipe
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(folder)})})

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
        if name is None:
            raise ValueError(f"{model_type} has no sequence classifier in transformers: take modernbert or bert, for example")
        if model_type in backbones():
            backbone_for(model_type, name)
        model: type[PreTrainedModel] = getattr(transformers, name)
        return model

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig) -> LabelledText:
        data = recipe.data

        def tokenizer_of(texts: Iterable[str]) -> Any:
            if data.tokenizer is not None:
                return load_tokenizer(data.tokenizer, ends=False)
            if (start := start_of(recipe.model)) is not None:
                return load_tokenizer(*start.beside(TOKENIZER), ends=False)
            size: int = config.vocab_size
            return trained_tokenizer(texts, size, framed=True)

        if data.name == EMBEDDED:
            return passages(data.train_samples, data.eval_samples, data.sequence_length, tokenizer_of, recipe.seed)
        if data.name in ("json", "parquet", "csv") and data.data_files is None and data.data_dir is None:
            raise ValueError(f"data.name = {data.name!r} needs data.data_files or data.data_dir")
        return hub_labelled_text(
            text_source(data),
            data.train_split,
            data.validation_split,
            data.test_split,
            data.validation_fraction,
            Columns(data.text_column, data.second_text_column, data.label_column, data.num_labels),
            data.sequence_length,
            tokenizer_of,
            data.max_bad_fraction,
        )

    @classmethod
    def size(cls, recipe: Recipe) -> int:
        return recipe.data.sequence_length

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        assert isinstance(data, LabelledText)
        inner: Any = config
        entries, names = len(data.tokenizer), dict(enumerate(data.classes))
        if inner.vocab_size < entries:
            raise ValueError(
                f"the tokenizer has {entries} entries and the model {inner.vocab_size}: set model.config.vocab_size={entries} or more, "
                "or data.tokenizer to the model's own"
            )
        longest = getattr(inner, "max_position_embeddings", None)
        if longest is not None and longest < data.length:
            raise ValueError(f"data.sequence_length = {data.length} is more than the model's max_position_embeddings = {longest}: lower it")
        inner.id2label, inner.label2id = names, {name: code for code, name in names.items()}
        if not config.name_or_path:
            # A new model has the special tokens of its tokenizer, not those of the family's usual one.
            for name in ("pad", "cls", "sep", "bos", "eos"):
                if hasattr(inner, f"{name}_token_id"):
                    setattr(inner, f"{name}_token_id", getattr(data.tokenizer, f"{name}_token_id"))

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return TaskModule(cls, parts)

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        return int(batch["attention_mask"].sum())

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        loss: Tensor = cls.forward(model, batch, labels=batch["labels"], **options).loss
        return loss

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Any:
        # Where a family has no segments, the separator alone tells the two texts apart.
        segments = "token_type_ids" in batch and getattr(model.config, "type_vocab_size", 0) > 1
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
        return model(**{name: batch[name] for name in names}, **options)

    @classmethod
    def probe(cls, config: PretrainedConfig) -> dict[str, Tensor]:
        inner: Any = config
        ids = torch.randint(inner.vocab_size, (PROBES, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        lengths = torch.arange(_PROBE_TOKENS, _PROBE_TOKENS - PROBES, -1)
        return {"input_ids": ids, "attention_mask": (torch.arange(_PROBE_TOKENS) < lengths[:, None]).long()}

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        if to.suffix != ".html":
            raise ValueError(f"--to {to}: kept tokens of a text are an .html page")
        data = cls.open_data(recipe, model.config)
        text = given
        if text is None:
            # Its own frame is written around it again.
            text = data.tokenizer.decode(data.test[0]["input_ids"], skip_special_tokens=True)
        return inspect_text(model, data.tokenizer, text, data.length, f"{target}: tokens by stage", to)
