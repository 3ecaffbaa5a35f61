"""Lengths of arms that train as long as the recipe, in seconds: from step times that are measured in pairs."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

from ...data.rows import on_device
from ...modules.checkpoints.whole_files import write_json
from ..build.build import build
from ..build.parts import RunParts
from ..build.step_target import needs_calibration
from ..distributed.resume import FREE
from ..errors import RecipeError
from ..measure.arms import device_of_steps, name_of_device, step_of
from ..measure.bench import paired_ratio, paired_times
from ..measure.step_time import holding
from ..recipe.phases import PhasePlan
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from ..tasks.base import task_named
from .arms import Arm
from .running import threads

# Rounds in which the recipe and an arm make one step each.
ROUNDS = 20
FILE = "step_times.json"


def of_equal_time(arms: Sequence[Arm], main: Recipe, steps: int, folder: Path, console: Console, at_once: int = 1) -> list[Arm]:
    """The arms with the number of steps that takes each as long as the recipe: steps of the recipe × its step time ÷ the arm's.

    The ratios of step times are kept in ``step_times.json`` of the folder, with a hash of the recipes and the device that they are of, so
    that a comparison that goes on has the same lengths. An arm that is the recipe itself has its length.

    Args:
        arms: arms as long as the recipe in steps.
        main: the recipe itself.
        steps: its optimizer steps.
        folder: folder of the comparison.
        console: console for progress.
        at_once: number of trainings at the same time, which share the cores.

    Raises:
        RecipeError: an arm has a length of its own or a compiled model, runs of it have begun whose length was of other settings or
            another device, or the file is damaged.
    """
    recipes = {arm.name: arm.load(main.seed) for arm in arms}
    for name, recipe in {"learned": main, **recipes}.items():
        _check(name, recipe, main)
    with _threads(threads(at_once)):
        file, device = folder / FILE, name_of_device(device_of_steps())
        of_arm = {name: _hash(recipe, main, device) for name, recipe in recipes.items()}
        known = _read(file)
        itself = _hash(main, main, device)
        ratios = dict(known.values()) | {itself: 1.0}
        for name, of in of_arm.items():
            if of != itself and known.get(name, ("",))[0] != of and _begun(folder, name):
                raise RecipeError(
                    f"runs of arm {name} have begun, and {file} has no step time of it with these settings on {device}: repeat the command "
                    "with the settings, --jobs and device of these runs, or give another --output"
                )
        missing = {of: name for name, of in reversed(of_arm.items()) if of not in ratios}
        if missing:
            console.print(
                f"measuring training steps of {', '.join(missing.values())} beside the recipe's: {ROUNDS} rounds", highlight=False
            )
            found = step_times({name: recipes[name] for name in missing.values()}, main)
            ratios |= {of: found[name] for of, name in missing.items()}
    written = {name: {"of": of, "ratio": ratio} for name, (of, ratio) in known.items()}
    write_json(file, written | {name: {"of": of, "ratio": ratios[of]} for name, of in of_arm.items()})
    lengths = {name: max(1, round(steps / ratios[of])) for name, of in of_arm.items()}
    console.print(f"steps of equal time: {', '.join(f'{name} {length:,}' for name, length in lengths.items())}", highlight=False)
    return [replace(arm, overrides=(*arm.overrides, "trainer.max_epochs=null", f"trainer.max_steps={lengths[arm.name]}")) for arm in arms]


def step_times(recipes: Mapping[str, Recipe], main: Recipe) -> dict[str, float]:
    """Time of a training step of each recipe ÷ that of ``main``: medians of the ratios of interleaved rounds, in rotating order.

    A step is loading its batch, forward, backward, clipping and optimizer, with the keeps that training ends with. Selectors that leave the
    count to their router have a threshold that keeps what is requested: routers are not trained yet. A teacher is left out. Steps of each phase
    of a recipe are measured by themselves, and their mean over its steps counts. Two models are held at a time, and none afterwards.
    """
    # Its last phase is ordinary training.
    *_, (_, ours) = _steps(main)
    _free()
    own = _mean(main, ours) if main.phases else 1.0
    found = {name: _mean(recipe, ours) / own for name, recipe in recipes.items()}
    del ours
    _free()
    return found


def _mean(recipe: Recipe, ours: Callable[[], None]) -> float:
    """Mean time of a recipe's training steps ÷ the time of another step."""
    found = 0.0
    for share, step in _steps(recipe):
        times = paired_times({"": ours, "other": step}, device_of_steps(), ROUNDS)
        found += share * paired_ratio(times["other"], times[""]).median
        del step
        _free()
    return found


def _check(name: str, recipe: Recipe, main: Recipe) -> None:
    """Raises RecipeError if an arm's steps are measured otherwise than they train, or it has a length already."""
    if recipe.trainer.compile:
        raise RecipeError(
            f"arm {name} has trainer.compile = true, and --equal time measures steps that are not compiled: set trainer.compile=false, or "
            "give --equal steps"
        )
    if needs_calibration(recipe):
        raise RecipeError(
            f"arm {name} has budget.measure = step_time, to which each run is calibrated when it trains, and --equal time measures its steps "
            "before: set budget.measure=macs_ratio with the target that a run was calibrated to, or give --equal steps"
        )
    if recipe.training_keep is not None and recipe.training_keep.also:
        raise RecipeError(
            f"arm {name} has training_keep.also, and --equal time measures steps of one forward: set training_keep.also=[], or give --equal steps"
        )
    if (recipe.trainer.max_steps, recipe.trainer.max_epochs) != (main.trainer.max_steps, main.trainer.max_epochs):
        raise RecipeError(f"arm {name} has a length of its own, and --equal time sets it: remove trainer.max_steps, or give --equal steps")


def _hash(recipe: Recipe, main: Recipe, device: str) -> str:
    """A hash of what the ratio of step times depends on."""
    settings = []
    for one in (recipe, main):
        data = one.model_dump(mode="json", exclude={"seed"})
        for key in FREE:
            block, _, name = key.rpartition(".")
            (data[block] if block else data).pop(name)
        settings.append(data)
    return hashlib.sha256(json.dumps([device, *settings], sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, tuple[str, float]]:
    """Hash and ratio by arm. Raises RecipeError if the file is damaged."""
    if not file.is_file():
        return {}
    try:
        found = {name: (str(entry["of"]), float(entry["ratio"])) for name, entry in json.loads(file.read_text("utf-8")).items()}
        if not all(ratio > 0 for _, ratio in found.values()):
            raise ValueError("a ratio is not above 0")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is damaged ({error}): restore it, delete it if no run has begun, or give another --output") from None
    return found


def _begun(folder: Path, arm: str) -> bool:
    return any(path.name.rpartition("-")[0] == arm and RunFolder(path).started for path in folder.glob("*-*"))


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Context in which torch computes with as many threads as a training does."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _free() -> None:
    """Gives back the memory of models that nothing names any more: trainings need it."""
    gc.collect()
    torch.cuda.empty_cache()


def _steps(recipe: Recipe) -> Iterator[tuple[float, Callable[[], None]]]:
    """By phase, its share of the steps and a function that makes one of its training steps, from loading to optimizer."""
    parts = build(task_named(recipe.task).resolved(recipe))
    lightning.seed_everything(recipe.seed, verbose=False)
    model, plan = holding(parts.model).to(device_of_steps()), parts.phases
    if plan is None:
        yield 1.0, step_of(parts, model, _batches(parts))
        return
    for steps, phase in zip(plan.steps, plan.phases, strict=True):
        alone = replace(parts, phases=PhasePlan((phase,), (parts.total_steps,), plan.stages))
        step = step_of(alone, model, _batches(alone))
        yield steps / parts.total_steps, functools.partial(step, plan.keep(phase)) if plan.stages else step


def _batches(parts: RunParts) -> Iterator[dict[str, Any]]:
    """Training batches with a good row, without end, on the device of steps."""
    device = device_of_steps()
    for batch in itertools.chain.from_iterable(itertools.repeat(parts.data_module().train_dataloader())):
        if "sample_ids" in batch:
            yield on_device(batch, device)
