"""What a task declares, so that runs, evaluation, export and reports need to know none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...data.splits import Splits
from ...modules import registry
from ...modules.tokens.trace import Trace
from ..build.parts import RunParts
from ..metrics.quality import Quality
from ..recipe.schema import ModelRecipe, Recipe
from ..run_folder import RunFolder

PROBES = 8


class Task:
    """One kind of thing to learn. Stateless, used as a class.

    Attributes:
        metric: name of its metric in reports and logs; a key of what ``evaluate`` gives.
        higher_is_better: of the metric.
        quality: counts the metric.
        unit: what speed is counted in, plural.
        item: what a batch holds, plural.
        controls: scorers that ``laconic evaluate`` puts in the place of a model's own.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    quality: ClassVar[type[Quality]]
    unit: ClassVar[str]
    item: ClassVar[str]
    controls: ClassVar[tuple[str, ...]] = ("random",)

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
    def resolved(cls, recipe: Recipe) -> Recipe:
        """The recipe with what its model decides filled in, as a run records it."""
        return recipe

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        """The recipe of a trained model, to evaluate it: with what lies beside its weights.

        Args:
            recipe: of the run.
            run: with the weights.
        """
        return recipe

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig) -> Splits:
        """The splits that a recipe names, as the model of ``config`` takes them. Raises ValueError where they cannot be had."""
        raise NotImplementedError

    @classmethod
    def size(cls, recipe: Recipe) -> tuple[int, int] | int | None:
        """Of one row as the model takes it: height and width in pixels, or tokens of the longest text; None where the model's config says it."""
        return None

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        """Makes a config fit the data, in place, before its model is built. Raises ValueError where it cannot.

        Args:
            config: of the dense model.
            data: the splits.
        """

    @classmethod
    def module(cls, parts: RunParts) -> lightning.LightningModule:
        """What Lightning trains, with the training extras that the recipe asks for."""
        raise NotImplementedError

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """The task's own loss of a batch, with gradient.

        Args:
            model: dense or compressed.
            batch: on the model's device.
            options: of the model's forward: the trace of a compressed one.
        """
        raise NotImplementedError

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Any:
        """What a model answers to a batch in evaluation, for ``quality``. Arguments as of ``loss``."""
        raise NotImplementedError

    @classmethod
    def probe(cls, config: PretrainedConfig) -> dict[str, Tensor]:
        """PROBES rows of noise as a model of a config takes them, to compare the ``logits`` of an export on."""
        raise NotImplementedError

    @classmethod
    def draw(cls, arms: Mapping[str, RunParts], folder: Path) -> None:
        """Draws what the arms of a run did, into its folder, where the task has a picture of it.

        Args:
            arms: by name, the recipe itself last.
            folder: of the run.
        """

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        """Shows which tokens a compressed model keeps; returns achieved keep by stage.

        Args:
            target: name of the run, for a title.
            recipe: of the run.
            model: with its stages, in evaluation mode.
            given: what to look at, in the task's own way; None takes held-out data.
            to: file to write.

        Raises:
            ValueError: the task cannot show it, or ``given`` is not of the right kind.
        """
        raise ValueError(f"task {recipe.task!r} has nothing to show here")

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        """How many of the task's ``unit`` a batch holds."""
        return len(batch["sample_ids"])

    @classmethod
    def compile(cls, model: PreTrainedModel) -> None:
        """torch.compile of what a training step calls, in place."""
        model.compile()


def give_labels(options: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Gives the labels of a batch to the trace of its forward, where estimators find them.

    Args:
        options: of the forward, with its ``trace`` if the model is compressed.
        batch: with ``labels``, unless the task has none.
    """
    trace: Trace | None = options.get("trace")
    if trace is not None:
        trace.labels = batch.get("labels")


def names() -> Sequence[str]:
    """The tasks there are."""
    return registry.names(__package__)


def task_named(name: str) -> type[Task]:
    """A task by its file's name. Raises ValueError naming those there are."""
    return registry.find(__package__, name, Task)
