"""Builds configuration, data, model and budget from a recipe, without training."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ...data.labels.classes import KnownClasses
from ...data.splits import Splits
from ...modules.backbones import families
from ...modules.budget.budget import Budget
from ...modules.checkpoints.adapters import check_base, quietly
from ...modules.checkpoints.base_weights import Base, base_of
from ...modules.checkpoints.foreign_config import check_size
from ...modules.checkpoints.from_mae import encoder_config, load_encoder, load_routers
from ...modules.compatibility import check_held
from ...modules.compress import checkpoint_activations, compress
from ...modules.config import CompressionConfig
from ...modules.cost.cost import CostModel
from ...modules.stage import stages_of
from ..distributed import collective
from ..distributed.strategies import processes_of
from ..distributed.zero3 import broadcast_weights, zero3_init
from ..recipe.phases import PhasePlan
from ..recipe.schema import ModelRecipe, Recipe
from ..run_folder import RunFolder
from ..tasks.base import Task, task_named
from .floor import check_floor
from .heads import check_known, has_head, known_classes, named_classes, renew_heads
from .image_size import scale_images
from .initial_weights import PRETRAIN, Start, check_start, encoder_weights, load_stages, load_state, start_of
from .keeps import check_keeps
from .model_settings import check_settings, set_outputs, with_settings
from .part_rates import check_part_lr, freeze_parts
from .parts import RunParts
from .step_target import budget_of, needs_calibration, with_macs
from .tower import load_tower, tower_config, with_own_tower
from .trainable import quantization, train_parts
from .vocabulary import fit_vocabulary, set_vocabulary


def build(
    recipe: Recipe, data: Splits | None = None, shards: Mapping[str, Any] | None = None, resumed: RunFolder | None = None
) -> RunParts:
    """Builds every part of a run. The same seed gives the same backbone weights for every compression and strategy.

    Args:
        recipe: a checked recipe.
        data: splits that another arm has opened; None opens them.
        shards: DeepSpeed's configuration, to build the model partitioned (ZeRO-3); None builds the whole model.
        resumed: run that goes on; its tokenizer is used. A new one would give the tokens of grown files other ids.

    Raises:
        ValueError: the recipe does not fit the real model or data: a layer or a column does not exist …
    """
    assumed, recipe, task = needs_calibration(recipe), with_macs(recipe), task_named(recipe.task)
    task.check(recipe)
    recipe = recipe.model_copy(update={"model": with_own_tower(recipe.model, resumed)})
    start = start_of(recipe.model)
    config = model_config(recipe.model, task, start)
    recipe = located_stages(recipe, config)
    check_part_lr(recipe, config)
    check_start(recipe, start)
    data = data if data is not None else open_data(recipe if resumed is None else task.of_run(recipe, resumed), config, start)
    of_weights = fit_vocabulary(recipe.model, config, data)
    lightning.seed_everything(recipe.seed, verbose=False)
    steps = total_steps(recipe, data)
    phases = PhasePlan.of(recipe.phases, recipe.compression, steps)
    base = collective.from_rank_zero(lambda: _base(recipe, start))
    if shards is None:
        dense, new, start = _starting_model(recipe, config, data, task, start, of_weights)
        model, cost, budget = _assemble(recipe, dense, steps, start, new, True, assumed)
    else:
        source, new = None, []
        if collective.rank() == 0:
            # A copy of the configuration, because compress changes it.
            dense, new, left = _starting_model(recipe, copy.deepcopy(config), data, task, start, of_weights)
            source = _assemble(recipe, dense, steps, left, new, True, assumed)[0]
        missing = new
        new = collective.from_rank_zero(lambda: missing)
        with zero3_init(shards):
            bare = recipe.model.model_copy(update={"name": None, "config": {}})
            model, cost, budget = _assemble(recipe, build_model(bare, config, data, task), steps, start, new, False, assumed)
        broadcast_weights(model, source)
    data = task.fit_data(recipe, data, config, cost)
    return RunParts(recipe, data, model, cost, budget, steps, base, phases)


def located_stages(recipe: Recipe, config: PretrainedConfig) -> Recipe:
    """The recipe with the layers and restores of its stages as they are in a model of a config."""
    adapter = families().get(config.model_type)
    if recipe.compression is None or adapter is None:
        return recipe
    return recipe.model_copy(update={"compression": adapter.resolved(recipe.compression, config)})


def open_data(recipe: Recipe, config: PretrainedConfig, start: Start | None, known: KnownClasses | None = None) -> Splits:
    """The splits of a recipe; labels are mapped by name onto the classes of a trained model.

    Args:
        recipe: the recipe.
        config: config of the model.
        start: initial weights of a training run, whose classes count; None for random ones.
        known: classes of the model that is evaluated; None takes those of ``start``.

    Raises:
        ValueError: the data cannot be opened, or have classes that the model lacks.
    """
    task = task_named(recipe.task)
    known = known or known_classes(recipe, start, task.model_class(config.model_type))
    data = task.open_data(recipe, config, known)
    check_known(data.classes, known)
    return data


def _base(recipe: Recipe, start: Start | None) -> Base | None:
    """The base that the run's adapter will name, with hashes of its weights; a loaded adapter's base is checked against its hashes."""
    if recipe.lora is None or not recipe.lora.freezes:
        return None
    assert start is not None
    assert start.weights is not None
    if start.adapter is None:
        return base_of(start.weights, start.revision)
    check_base(start.adapter, start.name, start.weights, start.revision)
    return start.adapter.base


def _starting_model(
    recipe: Recipe, config: PretrainedConfig, data: Splits, task: type[Task], start: Start | None, of_weights: int | None
) -> tuple[PreTrainedModel, list[str], Start | None]:
    """The dense model with its initial weights, the names of the modules that these weights lack, and the start without replaced heads.

    ``of_weights`` is the vocabulary of the weights if the config has another one.
    """
    if start is None:
        return build_model(recipe.model, config, data, task), [], None
    known = named_classes(config)
    task.fit_config(config, data)
    entries = None if of_weights is None else set_vocabulary(config, of_weights)
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
    if entries is not None:
        # New ones are drawn around the mean of the others.
        model.resize_token_embeddings(entries)
    if data.classes and has_head(start, type(model)) and (recipe.model.new_head or (known and known != named_classes(config))):
        renewed = renew_heads(model)
        lacking += [f"{name}.weight" for name in renewed]
        if start.adapter is not None:
            full = tuple(name for name in start.adapter.full if name not in renewed)
            start = replace(start, adapter=replace(start.adapter, full=full))
    return model, sorted({name.rpartition(".")[0] for name in lacking}), start


def _assemble(
    recipe: Recipe, model: PreTrainedModel, steps: int, start: Start | None, new: Sequence[str], filled: bool, assumed: bool
) -> tuple[PreTrainedModel, CostModel | None, Budget | None]:
    """Compression, budget, cost model and LoRA on a dense model; if ``filled`` is False, the weights are set later.

    ``assumed`` is that of ``budget_of``.
    """
    budget, size = None, task_named(recipe.task).size(recipe)
    if recipe.compression is not None:
        # Stages are initialised after the backbone, so that a dense arm starts from the same backbone weights.
        compression = recipe.compression
        if recipe.budget is not None:
            budget = budget_of(recipe, model, compression, steps, assumed)
            compression = budget.compression
        elif recipe.phases:
            # Stages that phases decide for do nothing outside of them.
            compression = compression.with_keep({stage.key: 1.0 for stage in compression.stages if stage.free})
        model = compress(model, compression)
        if budget is None:
            check_held(stages_of(model).values(), held=False)
        check_keeps(recipe, stages_of(model).values())
        if recipe.model.encoder_routers and filled:
            load_routers(model, encoder_weights(recipe.model), recipe.model.revision)
        if start is not None and filled:
            load_stages(model, start)
    # Counted without LoRA: merged LoRA adds no MACs.
    cost = cost_model(model, size=size)
    if cost is not None:
        check_floor(recipe, cost)
    train_parts(recipe.lora, model, new, start.adapter if start is not None else None, filled)
    freeze_parts(recipe, model)
    if recipe.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return model, cost, budget


def model_config(recipe: ModelRecipe, task: type[Task], start: Start | None = None) -> PretrainedConfig:
    """The configuration of the task's model. Raises ValueError if it cannot be loaded or no adapter supports the family."""
    if recipe.config is not None:
        settings = {**recipe.config, **recipe.settings}
        model_type = settings.pop("model_type")
        architecture = task.model_class(model_type).__name__
        check_settings(model_type, {key: value for key, value in recipe.config.items() if key != "model_type"}, "model.config")
        check_settings(model_type, recipe.settings, "model.settings")
        if recipe.tower_of is not None:
            settings["vision_config"] = tower_config(recipe).to_dict()
        try:
            # transformers selects the head of some families by the architecture.
            config: PretrainedConfig = AutoConfig.for_model(model_type, **{"architectures": [architecture], **settings})
        except Exception as error:
            # transformers validates its configs with several exception types; all of them are errors in the recipe here.
            raise ValueError(f"model.config: {' '.join(str(error).split())}") from None
        check_size(config, "model.config")
        scale_images(recipe, config)
        return config
    if recipe.encoder_of is not None:
        return _of_task(_encoder_config(recipe), recipe, task)
    start = start_of(recipe) if start is None else start
    assert start is not None
    return _of_task(start.config, recipe, task)


def _encoder_config(recipe: ModelRecipe) -> PretrainedConfig:
    weights = encoder_weights(recipe)
    try:
        return encoder_config(weights, recipe.revision)
    except ValueError as error:
        raise ValueError(f"model.encoder_of = {recipe.encoder_of!r}: {error}; {PRETRAIN}") from None


def _of_task(config: PretrainedConfig, recipe: ModelRecipe, task: type[Task]) -> PretrainedConfig:
    """The config of loaded weights with the recipe's settings and the task's architecture."""
    model_class = task.model_class(config.model_type)
    config = with_settings(config, recipe.settings, model_class)
    set_outputs(config)
    # The task's plain head, even if the checkpoint has another (distilled DeiT's second head takes no labels).
    config.architectures = [model_class.__name__]
    scale_images(recipe, config)
    return config


def build_model(recipe: ModelRecipe, config: PretrainedConfig, data: Splits, task: type[Task]) -> PreTrainedModel:
    """The dense model with the head that fits the data."""
    task.fit_config(config, data)
    if recipe.config is None and recipe.encoder_of is None:
        return task.loaded_model(recipe, config)
    model = task.fresh_model(config, recipe.attention)
    if recipe.config is None and recipe.encoder_of is not None:
        load_encoder(model, encoder_weights(recipe), recipe.revision)
    # An empty config stands for that of ``config``, for a model whose weights do not matter.
    if recipe.tower_of is not None and recipe.config:
        load_tower(model, recipe)
    return model


def cost_model(
    model: PreTrainedModel, compression: CompressionConfig | None = None, size: tuple[int, int] | int | None = None
) -> CostModel | None:
    """The cost model of a forward; None for a dense model of a family without an adapter, which can be trained but not counted.

    Args:
        model: dense or compressed model.
        compression: stages to count for a dense model.
        size: size of an input; None uses the model's own.
    """
    dense = compression is None and not hasattr(model.config, "compression")
    return None if dense and model.config.model_type not in families() else CostModel(model, compression, size)


def total_steps(recipe: Recipe, data: Splits) -> int:
    """Optimizer steps of a run."""
    trainer = recipe.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    assert trainer.max_epochs is not None
    if data.train_rows is None:
        raise ValueError(
            "trainer.max_epochs needs the number of training rows, which data.streaming = true does not provide: set trainer.max_steps"
        )
    rows = data.train_rows
    return max(1, math.floor(trainer.max_epochs * rows / (recipe.data.batch_size * trainer.accumulate * processes_of(trainer))))
