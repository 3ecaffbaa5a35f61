"""What a task declares, so that runs, evaluation, export and reports need to know none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...data.images import ImageTransform
from ...data.module import ImageData
from ...modules import parts as registry

if TYPE_CHECKING:
    from ..build import Parts
    from ..recipe import DataRecipe, ModelRecipe, Recipe
    from ..task_module import TaskModule

PROBES = 8


class Quality:
    """A metric while it is being counted: what can be summed over batches and ranks before anything is divided."""

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        """Counts one batch.

        Args:
            out: what the model answered.
            batch: that it answered to, on the same device.
        """
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        """Adds what another rank counted."""
        raise NotImplementedError

    @property
    def value(self) -> float:
        """The metric."""
        raise NotImplementedError

    def details(self, data: ImageData) -> dict[str, Any]:
        """What the report's ``quality`` says beside the metric, JSON-able."""
        return {}


class Task:
    """One kind of thing to learn. Stateless, used as a class.

    Attributes:
        metric: name of its metric in reports and logs; a key of what ``evaluate`` gives.
        higher_is_better: of the metric.
        quality: counts the metric.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    quality: ClassVar[type[Quality]]

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raises ValueError, with the cure, where a recipe asks for what the task does not have."""

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        """The class that a family's models have for the task.

        Raises:
            ValueError: the family has none; the message says which to take.
        """
        raise NotImplementedError

    @classmethod
    def fresh_model(cls, config: PretrainedConfig, attention: str) -> PreTrainedModel:
        """A dense model with random weights."""
        return cls.model_class(config.model_type)._from_config(config, attn_implementation=attention)

    @classmethod
    def loaded_model(cls, recipe: ModelRecipe, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """A dense model with the weights that a recipe names, its head new where it does not fit.

        Args:
            recipe: that names them.
            config: of the model.
            options: for transformers' ``from_pretrained``; with ``output_loading_info`` its report comes back beside the model.
        """
        model: PreTrainedModel = cls.model_class(config.model_type).from_pretrained(
            recipe.name,
            revision=recipe.revision,
            config=config,
            attn_implementation=recipe.attention,
            ignore_mismatched_sizes=True,
            # Whatever the checkpoint was saved in: trainer.precision decides what is computed in bf16.
            dtype=torch.float32,
            **options,
        )
        return model

    @classmethod
    def embedded_data(cls, recipe: DataRecipe, seed: int) -> ImageData:
        """The splits of ``scattered_digits``."""
        raise NotImplementedError

    @classmethod
    def hub_data(cls, recipe: DataRecipe, transform: ImageTransform, seed: int) -> ImageData:
        """The splits of any data set of Hugging Face ``datasets``."""
        raise NotImplementedError

    @classmethod
    def module(cls, parts: Parts) -> TaskModule:
        """What Lightning trains, with the training extras that the recipe asks for."""
        raise NotImplementedError

    @classmethod
    def step_inputs(cls, batch: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
        """Of a batch, what the model of a config needs for its own loss, for measuring a step."""
        return {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}

    @classmethod
    def evaluation_inputs(cls, batch: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Tensor]:
        """Of a batch, what the model of a config needs to answer without labels."""
        return {"pixel_values": batch["pixel_values"]}

    @classmethod
    def probe(cls, size: int, channels: int, config: PretrainedConfig) -> dict[str, Tensor]:
        """Inputs of noise to compare the ``logits`` of an export on.

        Args:
            size: height and width of the model's images.
            channels: of them.
            config: of the model.
        """
        return {"pixel_values": torch.rand(PROBES, channels, size, size, generator=torch.Generator().manual_seed(0))}

    @classmethod
    def titles(cls, batch: Mapping[str, Any], data: ImageData) -> list[str]:
        """One for each image of a batch, over its pictures."""
        return [""] * len(batch["pixel_values"])

    @classmethod
    def truth(cls, batch: Mapping[str, Any], data: ImageData) -> np.ndarray | None:
        """(B, height, width, 3) uint8 pictures of what is right; None where it is no picture."""
        return None

    @classmethod
    def answer(cls, out: Any, data: ImageData) -> np.ndarray | None:
        """(B, height, width, 3) uint8 pictures of what a model answered; None where it is no picture."""
        return None


def names() -> Sequence[str]:
    """The tasks there are."""
    return registry.names(__package__)


def task_named(name: str) -> type[Task]:
    """A task by its file's name. Raises ValueError naming those there are."""
    return registry.find(__package__, name, Task)
