"""Paired measurement of a run's arms, on its own data and with its own losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from ...data.rows import collate, good_rows
from ...data.splits import Splits
from ...modules.compress import decompress
from ...modules.tokens.trace import Trace
from ..build.part_rates import optimizer_of
from ..build.parts import RunParts
from ..distributed.deepspeed import stage_of
from ..recipe.schema import Recipe
from ..tasks.base import task_named
from .bench import Bench, bench
from .report import Arm
from .training_step import TrainingStep, Update


def bench_models(
    parts: Mapping[str, RunParts],
    recipe: Recipe,
    console: Console,
    seconds: float = math.inf,
    batch: Mapping[str, Any] | None = None,
) -> Bench:
    """Measures the compressed arms in pairs, on a batch of the recipe's own training data.

    Args:
        parts: parts of the arms by name.
        recipe: recipe of the run.
        console: console for progress.
        seconds: time after which no further round begins.
        batch: a batch in place of one of the data.
    """
    first = next(iter(parts.values()))
    task, device = task_named(first.recipe.task), device_of_steps()
    whole, inputs = batch_of(first.data, recipe, device) if batch is None else (batch, _tensors(batch, device))
    models = {name: copy.deepcopy(item.model).to(device) for name, item in parts.items()}
    dense = decompress(copy.deepcopy(first.model)).to(device)

    def loss(name: str, model: PreTrainedModel, given: Mapping[str, Tensor]) -> Tensor:
        return loss_of(first if name == "dense" else parts[name], model, given)

    rounds = recipe.trainer.bench_rounds or 40
    with console.status(f"measuring training steps: {rounds} paired rounds"):
        return bench(
            dense, models, inputs, loss, rounds, seconds, forward=task.forward, amount=task.amount(whole), update=update_of(recipe)
        )


def device_of_steps() -> torch.device:
    """The device that steps are measured on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of_device(device: torch.device) -> str:
    """A device's name, on the CPU its threads: step times of two with one name are comparable."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def batch_of(data: Splits, recipe: Recipe, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The first batch of a recipe's training data, and its tensors on a device."""
    size = recipe.data.batch_size
    # A stream has no length; its bad rows are left out when it is read.
    rows = [data.train[index] for index in range(size)] if data.train_rows is None else good_rows(data.train, size)
    whole = collate(rows)
    return whole, _tensors(whole, device)


def _tensors(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def loss_of(parts: RunParts, model: PreTrainedModel, inputs: Mapping[str, Tensor], keep: Mapping[str, float] | None = None) -> Tensor:
    """The loss of a training step at the end of a run's schedule.

    Args:
        parts: parts of the run.
        model: dense or compressed model.
        inputs: a batch.
        keep: requested keep by stage name in place of the run's own; None for the run's.
    """
    task, budget, last = task_named(parts.recipe.task), parts.budget, parts.total_steps
    with torch.autocast(model.device.type, torch.bfloat16, enabled=parts.recipe.trainer.precision == "bf16"):
        if not hasattr(model.config, "compression"):
            return task.loss(model, inputs)
        trace = budget.trace(last, inputs["sample_ids"]) if budget is not None else Trace(sample_ids=inputs["sample_ids"])
        # The first process measures while the others wait.
        trace.alone = True
        if parts.phases is not None:
            trace.idle = parts.phases.idle(parts.phases.at(last))
        if keep is not None:
            trace.keep = keep
        of_task = task.loss(model, inputs, trace=trace)
        if budget is not None:
            return of_task + budget.loss(trace, last).total
        return of_task if trace.auxiliary_loss is None else of_task + trace.auxiliary_loss


def step_of(parts: RunParts, model: PreTrainedModel, batches: Iterator[Mapping[str, Any]]) -> TrainingStep:
    """The training step of a run, with the keeps that its training ends with, or with those that the step is called with.

    Args:
        parts: parts of the run.
        model: its model, or another one that is trained in the same way.
        batches: batches without end, on the model's device.
    """

    def loss(batch: Mapping[str, Tensor], keep: Mapping[str, float] | None = None) -> Tensor:
        return loss_of(parts, model, batch, keep)

    return TrainingStep(model, loss, batches, update_of(parts.recipe))


def update_of(recipe: Recipe) -> Update:
    """Optimizer, clipping and batches of a recipe's training step."""
    settings = recipe.trainer
    fused = settings.precision == "fp32" or stage_of(settings) > 0
    return Update(lambda model: optimizer_of(model, recipe.optimizer, fused=fused), settings.clip, settings.accumulate)


def print_step_times(arms: Mapping[str, Arm], console: Console) -> None:
    """Prints one line for each arm whose budget is in step time: what was requested, and what was measured at the end."""
    for name, arm in arms.items():
        found = arm.step_time
        if found:
            end = f"{found['measured']:.3f} ({found['low']:.3f}–{found['high']:.3f})" if "measured" in found else "not"
            console.print(
                f"{name}: step time {found['target']:.3f} of dense requested, macs_ratio {found['macs_ratio']:.3f} by calibration, "
                f"{end} measured at the end",
                highlight=False,
                soft_wrap=True,
            )


def print_claims(measured: Bench, console: Console) -> None:
    """Prints one line an arm: the speed-up and % of oracle speed that its measurement supports."""
    for name, arm in measured.arms.items():
        console.print(
            f"{name}: speed-up at least {arm.claimed_speedup:.2f}×, at least {100 * arm.claimed_of_oracle:.1f} % of oracle speed "
            f"(lower 95 % bounds less the control's half-width {arm.control.half_width:.3f}; {measured.rounds} rounds)",
            highlight=False,
            soft_wrap=True,
        )
