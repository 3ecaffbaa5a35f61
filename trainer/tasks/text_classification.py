"""Classification of texts or pairs of texts by an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ...data.labels.classes import KnownClasses
from ...data.splits import Splits
from ...data.text.labelled import Columns, LabelledText, hub_labelled_text, passages
from ...data.text.recipe import LabelledTextRecipe
from ...modules.backbones import adapter_for, families
from ..build.parts import RunParts
from ..metrics.accuracy import Accuracy
from ..metrics.quality import Quality
from ..recipe.schema import Recipe
from ..task_module import TaskModule
from .base import fit_classes, give_labels
from .base_logits import LogitsTask
from .base_text import TextTask


class TextClassification(LogitsTask, TextTask):
    """One label a text, with any family that has a sequence classifier in transformers; stages need a family with an adapter."""

    metric = "accuracy"
    quality: ClassVar[type[Quality]] = Accuracy
    item: ClassVar[str] = "texts"
    framed: ClassVar[bool] = True

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
        if name is None:
            raise ValueError(f"{model_type} has no sequence classifier in transformers: use modernbert or bert, for example")
        if model_type in families():
            adapter_for(model_type, name)
        model: type[PreTrainedModel] = getattr(transformers, name)
        return model

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig, known: KnownClasses | None = None) -> LabelledText:
        data = recipe.data
        assert isinstance(data, LabelledTextRecipe)
        tokenizer_of = cls.tokenizer_of(recipe, config)
        if data.name == "python_passages":
            return passages(data.train_samples, data.eval_samples, data.sequence_length, tokenizer_of, recipe.seed)
        columns = Columns(data.text_column, data.second_text_column, data.label_column, data.num_labels)
        return hub_labelled_text(data.source, data.splits, columns, data.sequence_length, tokenizer_of, data.max_bad_fraction, known)

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        super().fit_config(config, data)
        if getattr(config, "is_decoder", False):
            raise ValueError(
                "the config has is_decoder = true, with which a text is read from left to right only: set model.settings.is_decoder=false"
            )
        assert isinstance(data, LabelledText)
        inner: Any = config
        fit_classes(config, data)
        if not config.name_or_path:
            # A new model uses the special tokens of its tokenizer instead of the family's default ones.
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
    def step(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> tuple[Tensor, Any]:
        give_labels(options, batch)
        out = cls.forward(model, batch, labels=batch["labels"], **options)
        return out.loss, out

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Any:
        # In families without segments only the separator token separates the two texts.
        segments = "token_type_ids" in batch and getattr(model.config, "type_vocab_size", 0) > 1
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
        return model(**{name: batch[name] for name in names}, **options)

    @classmethod
    def probe(cls, config: PretrainedConfig, tokens: int | None = None) -> dict[str, Tensor]:
        ids = super().probe(config, tokens)["input_ids"]
        rows, longest = ids.shape
        lengths = torch.arange(longest, longest - rows, -1)
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    @classmethod
    def noise(cls, config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
        labels = torch.arange(rows) % config.num_labels
        return {**super().noise(config, rows, length), "labels": labels}

    @classmethod
    def held_out(cls, data: LabelledText) -> str:
        # Without special tokens, because the caller's tokenizer adds them again.
        text: str = data.tokenizer.decode(data.test[0]["input_ids"], skip_special_tokens=True)
        return text

    @classmethod
    def given_text(cls, given: str) -> str:
        return given
