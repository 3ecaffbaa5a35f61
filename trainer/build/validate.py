"""Checks everything of a recipe that needs no training: keys, paths, columns, layers, budgets, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageClassification, PretrainedConfig

from ...modules.backbones import adapter_of
from ...modules.checkpoints.foreign_config import settings_errors
from ...modules.compatibility import check_deployable, check_held
from ...modules.cost.cost import CostModel
from ..distributed.strategies import check as check_strategy
from ..errors import RecipeError
from ..losses.teachers import check_teacher
from ..losses.token_loss import WHOLE
from ..recipe.phases import PhasePlan
from ..recipe.schema import ITSELF, Recipe
from ..run_folder import RunFolder
from ..tasks.base import task_named
from ..trackers.loggers import check_loggers
from .build import build_model, cost_model, located_stages, model_config, open_data, total_steps
from .floor import check_floor
from .heads import trained_classes
from .initial_weights import check_start, start_of
from .keeps import check_keeps
from .opened_data import check_rows
from .part_rates import check_part_lr, freeze_parts, groups_of, part_names, rates_of
from .step_target import budget_of, check_step_time, needs_calibration, with_macs
from .tower import with_own_tower
from .trainable import check_lora, parameter_counts, train_parts
from .vocabulary import fit_vocabulary


@dataclass(frozen=True)
class Checked:
    """Size and cost of a valid recipe.

    Attributes:
        parameters: parameters of the model, with stages and LoRA.
        trainable: trainable parameters; with a frozen base, a new head is not counted, because only loading the weights shows it.
        steps: optimizer steps.
        classes: number of classes of the data.
        train_rows: number of training rows; None for streamed data.
        keep: resolved keep by stage.
        tokens: number of tokens by layer; empty for a family without an adapter.
        macs_ratio: MACs of the compressed forward ÷ dense; 1 for a dense recipe.
        mean_keep: routable tokens processed ÷ those of the dense model, mean over the layers of the main stack; 1 for a dense recipe.
        dense_macs: MACs of the dense forward of a row; 0 for a family without an adapter.
        memory_bytes: estimated training memory of one process: weights, gradients, AdamW, the weight average, a teacher, and the
            activations of a batch if the family has an adapter.
        weight_bytes: weights alone, which stay in memory after training.
        dense_activation_bytes: activations of a batch in the dense model; 0 for a family without an adapter.
        remarks: what to know of the data, one line each: classes without rows, bad rows within the allowed share.
        groups: ``total`` and ``trainable`` parameters of each part, of LoRA and of routers; empty for a model of one part.
        rates: peak learning rate by group of the optimizer.
    """

    parameters: int
    trainable: int
    steps: int
    classes: int
    train_rows: int | None
    keep: dict[str, float]
    tokens: list[int]
    macs_ratio: float
    mean_keep: float
    dense_macs: int
    memory_bytes: int
    weight_bytes: int
    dense_activation_bytes: int
    remarks: list[str]
    groups: dict[str, dict[str, int]]
    rates: dict[str, float]


def validate(recipe: Recipe, trained: PretrainedConfig | None = None, resumed: RunFolder | None = None) -> Checked:
    """Checks a recipe against its real config and data; weights are neither loaded nor initialised.

    Args:
        recipe: the recipe.
        trained: config of the model that the recipe has trained, to evaluate it; None to train it.
        resumed: run that goes on, if it was started; None for a new run.

    Raises:
        ValueError: the recipe is wrong; the message says what is allowed.
    """
    check_strategy(recipe)
    check_lora(recipe)
    if trained is None:
        check_loggers(recipe.trainer.loggers)
        check_step_time(recipe)
    task = task_named(recipe.task)
    task.check(recipe)
    assumed, recipe = needs_calibration(recipe), with_macs(recipe)
    recipe = recipe.model_copy(update={"model": with_own_tower(recipe.model, resumed)})
    start = start_of(recipe.model)
    config = model_config(recipe.model, task, start)
    recipe = located_stages(recipe, config)
    check_part_lr(recipe, config)
    check_start(recipe, start)
    data = open_data(recipe, config, start, None if trained is None else trained_classes(trained, "the trained model"))
    fit_vocabulary(recipe.model, config, data)
    steps = total_steps(recipe, data)
    PhasePlan.of(recipe.phases, recipe.compression, steps)
    teacher = None
    if recipe.distillation is not None and recipe.distillation.teacher != ITSELF:
        teacher = check_teacher(recipe.distillation, recipe.model, config, data.classes)
    with settings_errors("the model cannot be built from model, lora and compression"), torch.device("meta"):
        model = build_model(recipe.model.model_copy(update={"name": None, "config": {}}), config, data, task)
        compression = recipe.compression
        if compression is not None and recipe.budget is not None:
            compression = budget_of(recipe, model, compression, steps, assumed).compression
        counted = cost_model(model, compression, task.size(recipe))
        if counted is not None:
            # Checked here, because evaluation would find it only after training.
            check_floor(recipe, counted)
            if recipe.budget is None:
                check_held(counted.stages, held=False)
            check_deployable(stage for stage in counted.stages if stage.adapter.causal)
            check_keeps(recipe, counted.stages)
        task.fit_data(recipe, data, config, counted)
        routers = sum(parameter.numel() for stage in (counted.stages if counted is not None else []) for parameter in stage.parameters())
        train_parts(recipe.lora, model, (), start.adapter if start is not None else None, filled=False)
        freeze_parts(recipe, model)
        # As in training: no gradient reaches layers that are left out, and no optimizer holds states for them.
        stacks = {stack.name: stack.layers for stack in adapter_of(model).stacks(model)} if counted is not None else {}
        for stage in counted.stages if counted is not None else ():
            if stage.skips and stage.config.site == "around":
                stacks[stage.config.stack][int(stage.config.layer)].requires_grad_(False)
        cost = None if counted is None else counted()
    # After the model, whose settings the rows must fit.
    remarks = check_rows(recipe, data)
    if assumed:
        remarks = [
            *remarks,
            "budget.measure = step_time: training measures steps on its device first; keeps and macs_ratio here are as if time were MACs",
        ]
    counts = parameter_counts(model)
    counts["routers"] = dict.fromkeys(("total", "trainable"), routers)
    parameters, trainable = (sum(group[kind] for group in counts.values()) for kind in ("total", "trainable"))
    # Weights; for trainable ones also gradients and two moments, and one more copy for an average.
    frozen = 0.5 if recipe.lora is not None and recipe.lora.quantize == "4bit" else 4
    held = round(frozen * (parameters - trainable)) + trainable * 4
    weights = held + trainable * (12 if recipe.trainer.ema is None else 16)
    if teacher is not None:
        with settings_errors("distillation.teacher cannot be built"), torch.device("meta"):
            weights += 4 * sum(p.numel() for p in AutoModelForImageClassification.from_config(teacher).parameters())
    batch = recipe.data.batch_size / (2 if recipe.trainer.precision == "bf16" else 1)
    activations = dense_activations = 0
    if cost is not None and counted is not None:
        # All forwards of a step are held until its backward.
        also = () if recipe.training_keep is None else recipe.training_keep.also
        moved = [stage.config.key for stage in counted.stages if not stage.config.left_out]
        held_at_once = [cost, *(counted(dict.fromkeys(moved, keep)) for keep in also)]
        activations = sum(round(item.activation_bytes * batch) + _logits_bytes(counted, recipe) for item in held_at_once)
        dense_activations = round(cost.dense_activation_bytes * batch) + _logits_bytes(counted, recipe)
    return Checked(
        parameters=parameters,
        trainable=trainable,
        steps=steps,
        classes=len(data.classes),
        train_rows=data.train_rows,
        keep={} if cost is None else dict(cost.keep),
        tokens=[] if cost is None else [tokens.attention for tokens in cost.layers],
        macs_ratio=1.0 if cost is None else cost.macs_ratio,
        mean_keep=1.0 if cost is None else cost.stack_keep.get(adapter_of(model).stack_name, 1.0),
        dense_macs=0 if cost is None else cost.dense_macs,
        memory_bytes=weights + activations,
        weight_bytes=held,
        dense_activation_bytes=dense_activations,
        remarks=remarks,
        groups=counts if part_names(config.model_type) else {},
        rates=rates_of(groups_of(model, recipe.optimizer))
        | ({"router": recipe.optimizer.router_lr or recipe.optimizer.lr} if routers else {}),
    )


def _logits_bytes(cost: CostModel, recipe: Recipe) -> int:
    """Bytes of the logits of a batch where each token has some, with their softmax and gradient; of large ones, the part that a loss in
    parts holds."""
    values = recipe.data.batch_size * cost.main.tokens * cost.main.head_macs_per_token / cost.main.hidden
    return round(3 * 4 * min(values, WHOLE))


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(checked: Checked, recipe: Recipe) -> None:
    """Raises RecipeError if the weights alone exceed this machine's memory, where every run builds them, before they are allocated."""
    memory = machine_memory()
    needed = checked.parameters * (0.5 if recipe.lora is not None and recipe.lora.quantize == "4bit" else 4)
    if needed > memory:
        raise RecipeError(
            f"the model's {checked.parameters:,} parameters need {needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB: "
            "make model.config smaller, or use a larger machine"
        )
