"""The interface of tasks: runs, evaluation, export and reports use it and know no single task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...data.labels.classes import KnownClasses
from ...data.splits import Splits
from ...modules import registry
from ...modules.cost.cost import CostModel
from ...modules.tokens.trace import Trace
from ..build.parts import RunParts
from ..losses.distillation import DistillationLoss, Taught
from ..metrics.predictions import Predictions
from ..metrics.quality import Quality
from ..recipe.schema import ITSELF, DistillationRecipe, ModelRecipe, Recipe
from ..run_folder import RunFolder

PROBES = 8


class Task:
    """One kind of training task. Stateless, used as a class.

    Attributes:
        metric: name of the metric in reports and logs; a key of the result of ``evaluate``.
        higher_is_better: whether a higher metric is better.
        quality: class that counts the metric.
        unit: unit of speed, plural.
        item: unit of a batch, plural.
        controls: scorers that ``laconic evaluate`` compares with the model's own.
        length_unit: what the length of an input is counted in: ``tokens`` or ``pixels``.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    quality: ClassVar[type[Quality]]
    unit: ClassVar[str]
    item: ClassVar[str]
    controls: ClassVar[tuple[str, ...]] = ("random",)
    length_unit: ClassVar[str] = "tokens"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raises ValueError, with the cure, if a recipe has settings that the task does not support."""

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        """The model class of a family for the task.

        Raises:
            ValueError: the family has none; the message names an alternative.
        """
        raise NotImplementedError

    @classmethod
    def fresh_model(cls, config: PretrainedConfig, attention: str) -> PreTrainedModel:
        """A dense model with random weights."""
        return cls.model_class(config.model_type)._from_config(config, attn_implementation=attention)

    @classmethod
    def loaded_model(cls, recipe: ModelRecipe, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """A dense model with the weights that a recipe names; a head that does not fit is new.

        Args:
            recipe: ``model`` block with the name of the weights.
            config: config of the model.
            options: arguments of transformers' ``from_pretrained``; with ``output_loading_info`` the result is (model, report).
        """
        model: PreTrainedModel = cls.model_class(config.model_type).from_pretrained(
            recipe.name,
            revision=recipe.revision,
            config=config,
            attn_implementation=recipe.attention,
            ignore_mismatched_sizes=True,
            # Whatever the checkpoint's dtype: trainer.precision decides what is computed in bf16.
            dtype=torch.float32,
            trust_remote_code=False,
            **options,
        )
        return model

    @classmethod
    def resolved(cls, recipe: Recipe) -> Recipe:
        """The recipe with values that depend on its model filled in, as a run records it."""
        return recipe

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        """The recipe of a trained model for evaluation, with the files beside its weights.

        Args:
            recipe: recipe of the run.
            run: folder with the weights.
        """
        return recipe

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig, known: KnownClasses | None = None) -> Splits:
        """The splits of a recipe as inputs for the model of ``config``.

        Args:
            recipe: the recipe.
            config: config of the model.
            known: classes of the trained model that is evaluated or continues to train; None if it has none.

        Raises:
            ValueError: they cannot be opened, or have classes that the model lacks.
        """
        raise NotImplementedError

    @classmethod
    def size(cls, recipe: Recipe) -> tuple[int, int] | int | None:
        """Size of one model input: height and width in pixels, or tokens of the longest text; None uses the size in the model's config."""
        return None

    @classmethod
    def fit_data(cls, recipe: Recipe, data: Splits, config: PretrainedConfig, cost: CostModel | None) -> Splits:
        """The splits as a model trains on them, by what its stages keep; the same ones in most tasks.

        Args:
            recipe: the recipe.
            data: its splits.
            config: config of the model.
            cost: cost model of the model with its stages; None for a family without an adapter.

        Raises:
            ValueError: the recipe asks for what the model or its stages do not allow.
        """
        return data

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        """Changes a config to fit the data, in place, before its model is built. Raises ValueError if it cannot fit.

        Args:
            config: config of the dense model.
            data: the splits.
        """

    @classmethod
    def module(cls, parts: RunParts) -> lightning.LightningModule:
        """The LightningModule of the recipe."""
        raise NotImplementedError

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """The task's own loss of a batch, with gradient.

        Args:
            model: dense or compressed model.
            batch: batch on the model's device.
            options: arguments of the model's forward: ``trace`` of a compressed model.
        """
        raise NotImplementedError

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Any:
        """Output of a model for a batch in evaluation, as ``quality`` needs it. Arguments as in ``loss``."""
        raise NotImplementedError

    @classmethod
    def teach(cls, model: PreTrainedModel, batch: Mapping[str, Any], recipe: DistillationRecipe, **options: Any) -> Taught:
        """What a model says about a batch as a teacher, in a task with labels.

        Args:
            model: the teacher, in evaluation mode and without gradient.
            batch: batch on the student's device.
            recipe: the ``distillation`` block.
            options: arguments of the model's forward.
        """
        raise NotImplementedError

    @classmethod
    def learn(
        cls, model: PreTrainedModel, batch: Mapping[str, Any], taught: Taught, recipe: DistillationRecipe, **options: Any
    ) -> DistillationLoss:
        """The loss of a forward that learns from labels and from a teacher.

        Args:
            model: the student.
            batch: batch on its device.
            taught: what ``teach`` gave for the batch.
            recipe: the ``distillation`` block.
            options: arguments of the model's forward.
        """
        raise NotImplementedError

    @classmethod
    def probe(cls, config: PretrainedConfig, tokens: int | None = None) -> dict[str, Tensor]:
        """PROBES rows of noise as inputs for the model of a config; exports are compared on their ``logits``.

        Args:
            config: config of the model.
            tokens: tokens of a row of text; None makes short rows.
        """
        raise NotImplementedError

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: Any, batch: Mapping[str, Any]) -> Predictions | None:
        """What a model predicts of a batch, where it has labels; None in a task without right answers.

        Args:
            model: the model.
            out: output of ``forward``.
            batch: the batch.
        """
        return None

    @classmethod
    def kept_cells(cls, model: PreTrainedModel, trace: Trace, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """By stage, what it keeps: (rows, columns) bool of each picture of a batch, or (tokens,) of each row of text.

        Args:
            model: compressed model.
            trace: trace of the batch's forward.
            batch: the batch.
        """
        return {}

    @classmethod
    def draw(cls, arms: Mapping[str, RunParts], folder: Path) -> None:
        """Draws a picture of a run's arms into its folder, if the task has one.

        Args:
            arms: parts by arm name, the recipe itself last.
            folder: folder of the run.
        """

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        """Shows the tokens that a compressed model keeps; returns achieved keep by stage.

        Args:
            target: name of the run, for a title.
            recipe: recipe of the run.
            model: model with its stages, in evaluation mode.
            given: input to show, in the task's own form; None uses held-out data.
            to: file to write.

        Raises:
            ValueError: the task cannot show it, or ``given`` has another form.
        """
        raise ValueError(f"task {recipe.task!r} does not support laconic inspect")

    @classmethod
    def pooled(cls, recipe: Recipe, keep: float) -> list[str]:
        """Overrides of an arm whose images are averaged over squares of patches before the first layer.

        Args:
            recipe: the recipe that it is compared with.
            keep: share of the tokens.

        Raises:
            ValueError: the task has no images.
        """
        raise ValueError(f"task = {recipe.task} has no images whose patches could be pooled")

    @classmethod
    def downsampled(cls, recipe: Recipe, scale: float) -> list[str]:
        """Overrides of an arm whose images are smaller.

        Args:
            recipe: the recipe that it is compared with.
            scale: their side, as a factor on that of the model's images.

        Raises:
            ValueError: the task has no images, or none of another size.
        """
        raise ValueError(f"task = {recipe.task} cannot be given smaller images: its arms have inputs of one size")

    @classmethod
    def at_length(cls, recipe: Recipe, config: PretrainedConfig, length: int) -> list[str]:
        """Overrides of a recipe whose inputs have another length.

        Args:
            recipe: the recipe.
            config: config of its model.
            length: tokens of a row of text, or the side of an image in pixels: ``length_unit``.

        Raises:
            ValueError: the task has no such lengths, or the model not this one.
        """
        raise ValueError(f"task = {recipe.task} has inputs of no one length: lengths are of text alone, or of images alone")

    @classmethod
    def noise(cls, config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
        """A training batch of noise, as ``collate`` makes it.

        Args:
            config: config of the model.
            rows: rows of the batch.
            length: length of each, as in ``at_length``.
        """
        raise NotImplementedError

    @classmethod
    def prompts(cls, data: Any, number: int) -> list[Tensor]:
        """Token ids (n,) of the longest of the first held-out prompts.

        Args:
            data: splits of the task.
            number: largest number of prompts.

        Raises:
            ValueError: the task has no prompts.
        """
        raise ValueError("only language models read prompts: take a recipe with task prompt_answers or causal_lm")

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        """Amount of a batch in the task's ``unit``."""
        return len(batch["sample_ids"])

    @classmethod
    def compile(cls, model: PreTrainedModel) -> None:
        """Applies torch.compile to the modules of a training step, in place."""
        model.compile()


def check_teacher_itself(recipe: Recipe) -> None:
    """Raises ValueError unless the teacher of a recipe, if it has one, is the model itself, and there is something to learn from it."""
    teacher = recipe.distillation
    if teacher is None:
        return
    if teacher.teacher != ITSELF:
        raise ValueError(f"distillation.teacher = {teacher.teacher!r} is for image classifiers, and task = {recipe.task}: set it to self")
    if recipe.compression is None:
        raise ValueError(
            "distillation.teacher = 'self' is the model with more tokens, and the recipe has no compression: remove distillation"
        )
    if teacher.hidden and (teacher.keep < 1 or teacher.milder is not None):
        raise ValueError(
            f"distillation.hidden = {teacher.hidden} compares with every token of the teacher, which has fewer by "
            f"{'keep' if teacher.milder is None else 'milder'}: set distillation.hidden=0, or remove distillation.keep and milder"
        )


def give_labels(options: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Passes the labels of a batch to the trace of its forward, for estimators.

    Args:
        options: arguments of the forward, with ``trace`` if the model is compressed.
        batch: batch with ``labels``, unless the task has none.
    """
    trace: Trace | None = options.get("trace")
    if trace is not None:
        trace.labels = batch.get("labels")


def fit_classes(config: PretrainedConfig, data: Splits) -> None:
    """Sets everything in a config that belongs to the classes of the data, in place, whatever a checkpoint's config has.

    Args:
        config: config of the dense model.
        data: splits with one label a row, or one a pixel.
    """
    if len(data.classes) < 2:
        raise ValueError(f"the data have {len(data.classes)} class(es), and a classifier needs 2 or more: check the labels of the data")
    inner: Any = config
    inner.id2label = dict(enumerate(data.classes))
    inner.label2id = {name: code for code, name in inner.id2label.items()}
    # Otherwise transformers chooses the loss by the checkpoint's setting, or by the number of classes.
    inner.problem_type = "single_label_classification"


def names() -> Sequence[str]:
    """Names of the tasks."""
    return registry.names(__package__)


def task_named(name: str) -> type[Task]:
    """The task of a name. Raises ValueError with the existing names."""
    return registry.find(__package__, name, Task)
