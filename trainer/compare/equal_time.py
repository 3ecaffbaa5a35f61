"""Lengths of arms that train as long as the recipe, in seconds: from step times that are measured side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from torch import Tensor

from ...modules.checkpoints.whole_files import write_json
from ..build.build import build
from ..build.part_rates import groups_of
from ..build.parts import RunParts
from ..errors import RecipeError
from ..measure.arms import device_of_steps, loss_of
from ..measure.bench import paired_ratio, paired_times
from ..recipe.schema import Recipe
from ..tasks.base import task_named
from .arms import Arm

# Rounds in which every arm makes one step.
ROUNDS = 20
FILE = "step_times.json"


def of_equal_time(arms: Sequence[Arm], main: Recipe, steps: int, folder: Path, console: Console) -> list[Arm]:
    """The arms with the number of steps that takes each as long as the recipe: steps of the recipe × its step time ÷ the arm's.

    The ratios of step times are kept in ``step_times.json`` of the folder, so that a comparison that goes on has the same lengths.

    Args:
        arms: arms as long as the recipe in steps.
        main: the recipe itself.
        steps: its optimizer steps.
        folder: folder of the comparison.
        console: console for progress.

    Raises:
        RecipeError: an arm has a length of its own, or phases.
    """
    recipes = {arm.name: arm.load(main.seed) for arm in arms}
    for name, recipe in {"learned": main, **recipes}.items():
        if recipe.phases is not None:
            raise RecipeError(
                f"arm {name} has phases, whose steps take different times: give --equal steps, and set lengths by ARM:trainer.max_steps"
            )
        if (recipe.trainer.max_steps, recipe.trainer.max_epochs) != (main.trainer.max_steps, main.trainer.max_epochs):
            raise RecipeError(
                f"arm {name} has a length of its own, and --equal time sets it: remove trainer.max_steps, or give --equal steps"
            )
    file = folder / FILE
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    if missing := {name: recipe for name, recipe in recipes.items() if name not in known}:
        console.print(f"measuring training steps of {', '.join(missing)} beside the recipe's: {ROUNDS} rounds", highlight=False)
        known |= step_times(missing, main)
        write_json(file, known)
    lengths = {name: max(1, round(steps / known[name])) for name in recipes}
    console.print(f"steps of equal time: {', '.join(f'{name} {length:,}' for name, length in lengths.items())}", highlight=False)
    return [replace(arm, overrides=(*arm.overrides, "trainer.max_epochs=null", f"trainer.max_steps={lengths[arm.name]}")) for arm in arms]


def step_times(recipes: Mapping[str, Recipe], main: Recipe) -> dict[str, float]:
    """Time of a training step of each recipe ÷ that of ``main``: medians of the ratios of interleaved rounds, in rotating order.

    A step is loading its batch, forward, backward and optimizer, with the keeps that training ends with. A teacher is left out.
    """
    steps = {name: _step(recipe) for name, recipe in {"": main, **recipes}.items()}
    times = paired_times(steps, device_of_steps(), ROUNDS)
    return {name: paired_ratio(times[name], times[""]).median for name in recipes}


def _step(recipe: Recipe) -> Callable[[], None]:
    """A function that makes one training step, from loading to optimizer."""
    parts = build(task_named(recipe.task).resolved(recipe))
    device = device_of_steps()
    model = parts.model.to(device).train()
    optimizer = torch.optim.AdamW(groups_of(model, recipe.optimizer))
    batches = _batches(parts)

    def step() -> None:
        for _ in range(recipe.trainer.accumulate):
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in next(batches).items()}
            loss_of(parts, model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batches(parts: RunParts) -> Any:
    """Training batches with a good row, without end."""
    lightning.seed_everything(parts.recipe.seed, verbose=False)
    endless = itertools.chain.from_iterable(itertools.repeat(parts.data_module().train_dataloader()))
    return (batch for batch in endless if "sample_ids" in batch)
