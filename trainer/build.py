"""From a recipe to its parts: configuration, data, model, budget. Nothing is trained here."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import yaml
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from ..data.hub import Source
from ..data.images import ImageTransform
from ..data.module import ImageData, ImageDataModule
from ..modules.adapters import check_base, quietly
from ..modules.backbones import backbones
from ..modules.backbones.vision import VisionBackbone
from ..modules.base_weights import Base, base_of
from ..modules.budget.budget import Budget
from ..modules.compress import checkpoint_activations, compress, stages_of
from ..modules.cost import CostModel
from ..modules.encoder import encoder_config, encoder_source, load_encoder, load_routers
from . import collective
from .lora import prepare, quantization
from .model_settings import check_settings, with_settings
from .recipe import DataRecipe, ModelRecipe, Recipe
from .sharded import fill, shell
from .starting import Start, check_start, load_stages, load_state, start_of
from .strategies import processes_of
from .tasks.base import Task, task_named


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        recipe: the recipe.
        data: splits.
        model: compressed if the recipe says so.
        cost: of the model.
        budget: None for a dense model, or where every stage has its own keep.
        total_steps: optimizer steps.
        base: weights that stay as they are, which an adapter names; None where everything trains.
    """

    recipe: Recipe
    data: ImageData
    model: PreTrainedModel
    cost: CostModel
    budget: Budget | None
    total_steps: int
    base: Base | None = None

    @property
    def task(self) -> type[Task]:
        """What is learned."""
        return task_named(self.recipe.task)

    def data_module(self) -> ImageDataModule:
        """Loaders for this run."""
        data, trainer = self.recipe.data, self.recipe.trainer
        batches = self.total_steps * trainer.accumulate
        return ImageDataModule(self.data, data.batch_size, data.eval_batch_size, batches, data.workers, self.recipe.seed)


def build(recipe: Recipe, data: ImageData | None = None, shards: Mapping[str, Any] | None = None) -> Parts:
    """Every part of a run; the same seed gives the same weights whatever the compression and the strategy.

    Args:
        recipe: a checked recipe.
        data: splits that another arm has opened already.
        shards: DeepSpeed's configuration, to build the model in shards (ZeRO-3); None builds it whole.

    Raises:
        ValueError: something that only shows against the real model or data: a layer that is not there, a missing column …
    """
    task = task_named(recipe.task)
    task.check(recipe)
    start = start_of(recipe.model)
    check_start(recipe, start)
    config = model_config(recipe.model, task, start)
    data = data if data is not None else open_data(recipe, config)
    lightning.seed_everything(recipe.seed, verbose=False)
    steps = total_steps(recipe, data)
    base = collective.from_rank_zero(lambda: _base(recipe, start))
    if shards is None:
        dense, new = _starting_model(recipe, config, data, task, start)
        model, cost, budget = _assemble(recipe, dense, steps, start, new)
    else:
        source, new = None, []
        if collective.rank() == 0:
            # Its own copy of the configuration: compress writes into it.
            dense, new = _starting_model(recipe, copy.deepcopy(config), data, task, start)
            source = _assemble(recipe, dense, steps, start, new)[0]
        missing = new
        new = collective.from_rank_zero(lambda: missing)
        with shell(shards):
            bare = recipe.model.model_copy(update={"name": None, "config": {}})
            model, cost, budget = _assemble(recipe, build_model(bare, config, data, task), steps, start, new, filled=False)
        fill(model, source)
    return Parts(recipe, data, model, cost, budget, steps, base)


def _base(recipe: Recipe, start: Start | None) -> Base | None:
    """What the adapter that a run writes will name, its weights hashed; of an adapter that goes on, compared with its own."""
    if recipe.lora is None or not recipe.lora.freezes:
        return None
    assert start is not None
    assert start.weights is not None
    if start.adapter is None:
        return base_of(start.weights, start.revision)
    check_base(start.adapter, start.name, start.weights, start.revision)
    return start.adapter.base


def _starting_model(
    recipe: Recipe, config: PretrainedConfig, data: ImageData, task: type[Task], start: Start | None
) -> tuple[PreTrainedModel, list[str]]:
    """The dense model with the weights that it starts from, and the names of the modules that they lack."""
    if start is None:
        return build_model(recipe.model, config, data, task), []
    _name_labels(config, data)
    if start.weights is None:
        model = task.fresh_model(config, recipe.model.attention)
        lacking = load_state(model, start)
    else:
        located = recipe.model.model_copy(update={"name": start.weights, "revision": start.revision})
        options = {"output_loading_info": True, **quantization(recipe.lora, task.model_class(config.model_type), config)}
        with quietly() if start.compression is not None or start.adapter is not None else contextlib.nullcontext():
            loaded: Any = task.loaded_model(located, config, **options)
        model, report = loaded
        lacking = [str(item[0] if isinstance(item, tuple) else item) for key in ("missing_keys", "mismatched_keys") for item in report[key]]
    return model, sorted({name.rpartition(".")[0] for name in lacking})


def _assemble(
    recipe: Recipe, model: PreTrainedModel, steps: int, start: Start | None, new: Sequence[str], filled: bool = True
) -> tuple[PreTrainedModel, CostModel, Budget | None]:
    """The dense model with what the recipe does to it; one that is not ``filled`` gets its values later."""
    budget = None
    if recipe.compression is not None:
        # Draws of the stages' weights come after the backbone's, so a dense arm starts from the same backbone.
        compression = recipe.compression
        if recipe.budget is not None:
            budget = Budget(recipe.budget, model, compression, steps, recipe.seed)
            compression = budget.compression
        model = compress(model, compression)
        unheld = [name for name, (_, stage) in stages_of(model).items() if budget is None and stage.selector.needs_probabilities]
        if unheld:
            raise ValueError(
                f"stages {', '.join(unheld)}: their selectors keep what is more likely than not, and only a budget with a regulariser brings "
                "that to what is requested: leave keep out and give budget.target and budget.regularizer, or take top_k or threshold"
            )
        if recipe.model.encoder_routers and filled:
            assert recipe.model.encoder_of is not None
            load_routers(model, recipe.model.encoder_of, recipe.model.revision)
        if start is not None and filled:
            load_stages(model, start)
    # LoRA costs nothing once it is merged.
    cost = CostModel(model)
    prepare(recipe.lora, model, new, start.adapter if start is not None else None, filled)
    if recipe.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return model, cost, budget


def model_config(recipe: ModelRecipe, task: type[Task], start: Start | None = None) -> PretrainedConfig:
    """The configuration of the task's model, without its weights. Raises ValueError where it cannot be had or no adapter serves it."""
    if recipe.config is not None:
        settings = {**recipe.config, **recipe.settings}
        model_type = settings.pop("model_type")
        architecture = task.model_class(model_type).__name__
        check_settings(model_type, {key: value for key, value in recipe.config.items() if key != "model_type"}, "model.config")
        check_settings(model_type, recipe.settings, "model.settings")
        try:
            # Where a family has several heads, transformers chooses by the architecture.
            return AutoConfig.for_model(model_type, **{"architectures": [architecture], **settings})
        except Exception as error:
            # transformers checks its configs with errors of several kinds; each is the user's setting here.
            raise ValueError(f"model.config: {' '.join(str(error).split())}") from None
    if recipe.encoder_of is not None:
        return _of_task(_encoder_config(recipe), recipe, task)
    start = start_of(recipe) if start is None else start
    assert start is not None
    return _of_task(start.config, recipe, task)


def _encoder_config(recipe: ModelRecipe) -> PretrainedConfig:
    assert recipe.encoder_of is not None
    try:
        return encoder_config(recipe.encoder_of, recipe.revision)
    except ValueError as error:
        raise ValueError(f"model.encoder_of = {recipe.encoder_of!r}: {error}") from None


def _of_task(config: PretrainedConfig, recipe: ModelRecipe, task: type[Task]) -> PretrainedConfig:
    """The config of weights that are loaded, with the recipe's settings and the task's head."""
    model_class = task.model_class(config.model_type)
    config = with_settings(config, recipe.settings, model_class)
    # The task's plain head, also where the checkpoint has another (distilled DeiT's second one takes no labels).
    config.architectures = [model_class.__name__]
    return config


def image_input(config: Any) -> tuple[int, int]:
    """Side in pixels and channels of the images that a model takes. Raises ValueError where its images are not square."""
    backbone = backbones()[config.model_type]
    assert issubclass(backbone, VisionBackbone)
    height, width, channels = backbone.image_input(config)
    if height != width:
        raise ValueError(f"model.config.image_size = {(height, width)}: images are cut square, give one number")
    return height, channels


def build_model(recipe: ModelRecipe, config: PretrainedConfig, data: ImageData, task: type[Task]) -> PreTrainedModel:
    """The dense model with a head for the data's classes."""
    _name_labels(config, data)
    if recipe.config is None and recipe.encoder_of is None:
        return task.loaded_model(recipe, config)
    model = task.fresh_model(config, recipe.attention)
    if recipe.config is None and recipe.encoder_of is not None:
        load_encoder(model, recipe.encoder_of, recipe.revision)
    return model


def _name_labels(config: PretrainedConfig, data: ImageData) -> None:
    names = dict(enumerate(data.classes))
    config.id2label, config.label2id = names, {name: code for code, name in names.items()}


def with_normalisation(recipe: Recipe) -> Recipe:
    """The recipe with ``data.mean`` and ``data.std`` filled in: its own, else those of the run that ``model.name`` is of, else those of
    the model's image processor, else 0.5."""
    found: dict[str, Any] = {}
    start = start_of(recipe.model)
    weights = recipe.model.encoder_of and encoder_source(recipe.model.encoder_of) if start is None else start.weights
    if start is not None and start.recipe is not None:
        before = yaml.safe_load(start.recipe.read_text()).get("data", {})
        found = {f"image_{key}": before.get(key) for key in ("mean", "std")}
    elif weights is not None and (recipe.data.mean is None or recipe.data.std is None):
        try:
            found, _ = ImageProcessingMixin.get_image_processor_dict(weights, revision=recipe.model.revision)
        except OSError:
            # Weights without a processor, as a model that was trained here from scratch has.
            found = {}
    half = [0.5]
    mean = recipe.data.mean if recipe.data.mean is not None else found.get("image_mean") or half
    std = recipe.data.std if recipe.data.std is not None else found.get("image_std") or half
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"mean": list(mean), "std": list(std)})})


def open_data(whole: Recipe, config: Any) -> ImageData:
    """The splits that a recipe names, as the model of ``config`` takes them."""
    recipe, seed, task = with_normalisation(whole).data, whole.seed, task_named(whole.task)
    assert recipe.mean is not None
    assert recipe.std is not None
    size, channels = image_input(config)
    if recipe.name == "scattered_digits":
        if (size, channels) != (recipe.canvas.size, 1):
            raise ValueError(
                f"data.canvas.size = {recipe.canvas.size} with 1 channel does not fit model.config: image_size = {size}, num_channels = {channels}"
            )
        for key in ("augmentation", "random_augment", "erase"):
            if getattr(recipe, key) not in ("none", None, 0):
                raise ValueError(
                    f"data.{key} is for images that are decoded, and data.name = 'scattered_digits' draws its own: leave it out; "
                    "data.mixing and data.label_smoothing work on any data"
                )
        return task.embedded_data(recipe, seed)
    if recipe.name == "imagefolder" and recipe.data_dir is None and recipe.data_files is None:
        raise ValueError("data.name = 'imagefolder' needs data.data_dir: the folder with one sub-folder of images a class")
    transform = ImageTransform(
        size,
        channels,
        _per_channel(recipe.mean, channels),
        _per_channel(recipe.std, channels),
        recipe.augmentation,
        recipe.random_augment,
        recipe.erase,
    )
    return task.hub_data(recipe, transform, seed)


def source_of(recipe: DataRecipe) -> Source:
    """Where a recipe's images come from."""
    return Source(
        recipe.name,
        recipe.data_dir,
        recipe.data_files,
        recipe.config,
        recipe.revision,
        recipe.image_column,
        recipe.label_column,
        recipe.mask_column,
    )


def _per_channel(values: list[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ValueError(f"data.mean and data.std must have 1 or {channels} values, not {len(values)}")
    return tuple(values) * (channels if len(values) == 1 else 1)


def total_steps(recipe: Recipe, data: ImageData) -> int:
    """Optimizer steps of a run."""
    trainer = recipe.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    assert trainer.max_epochs is not None
    rows = len(data.train)  # type: ignore[arg-type]
    return max(1, math.floor(trainer.max_epochs * rows / (recipe.data.batch_size * trainer.accumulate * processes_of(trainer))))
