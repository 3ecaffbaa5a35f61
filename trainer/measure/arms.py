"""Paired measurement of a run's arms, on its own data and with its own losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from ...data.rows import collate, good_rows
from ...modules.compress import decompress
from ...modules.tokens.trace import Trace
from ..build.parts import RunParts
from ..recipe.schema import Recipe
from ..tasks.base import task_named
from .bench import Bench, bench


def bench_models(parts: Mapping[str, RunParts], recipe: Recipe, console: Console, seconds: float = math.inf) -> Bench:
    """Measures the compressed arms in pairs, on a batch of the recipe's own training data.

    Args:
        parts: parts of the arms by name.
        recipe: recipe of the run.
        console: console for progress.
        seconds: time after which no further round begins.
    """
    first = next(iter(parts.values()))
    task = task_named(first.recipe.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A stream has no length; its bad rows are left out when it is read.
    streamed = first.data.train_rows is None
    rows = (
        [first.data.train[index] for index in range(recipe.data.batch_size)]
        if streamed
        else good_rows(first.data.train, recipe.data.batch_size)
    )
    whole = collate(rows)
    batch = {key: value.to(device) for key, value in whole.items() if isinstance(value, Tensor)}
    models = {name: copy.deepcopy(item.model).to(device) for name, item in parts.items()}
    dense = decompress(copy.deepcopy(first.model)).to(device)

    def loss(name: str, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.trainer.precision == "bf16"):
            if name == "dense":
                return task.loss(model, inputs)
            budget = parts[name].budget
            last = parts[name].total_steps
            trace = budget.trace(last, inputs["sample_ids"]) if budget is not None else Trace(sample_ids=inputs["sample_ids"])
            of_task = task.loss(model, inputs, trace=trace)
            if budget is not None:
                return of_task + budget.loss(trace, last).total
            return of_task if trace.auxiliary_loss is None else of_task + trace.auxiliary_loss

    rounds = recipe.trainer.bench_rounds or 40
    with console.status(f"measuring training steps: {rounds} paired rounds"):
        return bench(dense, models, batch, loss, rounds, seconds, forward=task.forward, amount=task.amount(whole))


def print_claims(measured: Bench, console: Console) -> None:
    """Prints one line an arm: the speed-up and % of oracle speed that its measurement supports."""
    for name, arm in measured.arms.items():
        console.print(
            f"{name}: speed-up at least {arm.claimed_speedup:.2f}×, at least {100 * arm.claimed_of_oracle:.1f} % of oracle speed "
            f"(lower 95 % bounds less the control's half-width {arm.control.half_width:.3f}; {measured.rounds} rounds)",
            highlight=False,
            soft_wrap=True,
        )
