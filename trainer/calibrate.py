"""``laconic calibrate``: sets the thresholds of a causal model's stages anew, on training rows, and saves them beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..data.rows import BadRows, on_device
from ..modules.budget.start_routers import calibrate_other_keeps, start_routers
from ..modules.checkpoints.adapter_folder import is_adapter, read_adapter, write_adapter
from ..modules.checkpoints.adapter_saving import stage_state
from ..modules.checkpoints.whole_files import HASHES, whole_folder, write_hashes
from ..modules.stage import stages_of
from ..modules.tokens.keep_count import KeepCount
from ..modules.tokens.trace import Trace
from .build.build import cost_model
from .build.trained_model import opened_data, trained_model
from .errors import RecipeError
from .probe.meter import batches_of
from .recipe.schema import Recipe
from .run_folder import EXPORTED, RunFolder
from .tasks.base import task_named


def calibrate(target: str, recipe: Recipe, weights: str, rows: int, console: Console) -> dict[str, Any]:
    """Sets thresholds so that each stage keeps what it requests, and writes them into the folder of the weights.

    Args:
        target: run, or folder of a model with stages.
        recipe: recipe of its task and data.
        weights: folder of its weights or adapter.
        rows: number of training rows.
        console: console for progress.

    Returns:
        ``requested`` and ``achieved`` keep by stage, on these rows.

    Raises:
        RecipeError: the folder cannot be written, no stage has a threshold, or the data cannot be opened.
    """
    folder = Path(weights)
    if not folder.is_dir() or (RunFolder.of(target).path / EXPORTED).is_file():
        raise RecipeError(
            f"{target}: thresholds are written beside the weights of a run or a local folder: calibrate it, and export it again"
        )
    model, task = trained_model(folder, recipe.task, target), task_named(recipe.task)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [stage for stage in stages_of(model).values() if stage.adapter.causal and stage.selector.calibrates and not stage.whole]
    if not chosen:
        raise RecipeError(f"{target} has no causal stage whose threshold follows its scores: there is nothing to calibrate")
    for stage in chosen:
        stage.selector.reset()
    try:
        data = opened_data(task.of_run(recipe, RunFolder.of(target)), model.config, model, target)
        batches = [on_device(batch, model.device) for batch in batches_of(data, rows, recipe.data.batch_size)]
    except BadRows as error:
        raise RecipeError(str(error)) from None

    def run(model: PreTrainedModel, batch: dict[str, Any], trace: Trace) -> Any:
        trace.sample_ids = batch["sample_ids"]
        return task.forward(model, batch, trace=trace)

    start_routers(model, batches, run, recipe.seed)
    names = [stage.config.key for stage in chosen]
    calibrate_other_keeps(model, names, batches, run, recipe.seed)
    count, cost = KeepCount(), cost_model(model, size=task.size(recipe))
    assert cost is not None
    with torch.no_grad():
        for number, batch in enumerate(batches):
            trace = Trace(seed=recipe.seed, step=number)
            run(model, batch, trace=trace)
            count.add(trace, cost, len(batch["sample_ids"]))
    found = {"requested": {name: cost().keep[name] for name in names}, "achieved": {name: count.achieved[name] for name in names}}
    write_stages(folder, {name: value.cpu() for name, value in stage_state(model).items()})
    for name in names:
        console.print(f"{name}: keep {found['achieved'][name]:.3f}, requested {found['requested'][name]:.3f}", highlight=False)
    return found


def write_stages(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Replaces the tensors of stages in a folder of weights or an adapter; the folder is replaced as a whole.

    Args:
        folder: the folder.
        state: tensors of all stages by the model's names.
    """
    with whole_folder(folder) as partial:
        if is_adapter(folder):
            adapter = read_adapter(folder)
            write_adapter(replace(adapter, stages={name: state[name] for name in adapter.stages}), partial)
        for path in sorted(folder.rglob("*")):
            there = partial / path.relative_to(folder)
            if path.is_dir():
                there.mkdir(parents=True, exist_ok=True)
            elif not there.exists():
                there.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, there, state)
        if (folder / HASHES).is_file():
            write_hashes(partial)


def _copy(path: Path, there: Path, state: Mapping[str, Tensor]) -> None:
    """A copy of a file, with new tensors if it holds stages."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), set(file.keys())
        if names & state.keys():
            tensors = load_file(path)
            save_file(
                {name: state[name].to(value.dtype).contiguous() if name in state else value for name, value in tensors.items()},
                there,
                metadata,
            )
            return
    shutil.copy2(path, there)
