"""Results of ``laconic cost`` and ``laconic bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...modules.budget.budget import Budget
from ...modules.checkpoints.foreign_config import settings_errors
from ...modules.cost.cost import Cost, CostModel
from ...modules.cost.shape import StackShape
from ..build.build import build, build_model, model_config, total_steps
from ..build.step_target import with_macs
from ..build.vocabulary import fit_vocabulary
from ..errors import RecipeError
from ..recipe.files import LoadedRecipe, load
from ..run_folder import RunFolder, load_model
from ..tasks.base import task_named
from .arms import bench_models


def cost_of_recipe(name: str, overrides: list[str]) -> dict[str, Any]:
    """Cost of a recipe's model, without initialising weights."""
    recipe = with_macs(load(name, overrides).recipe)
    task = task_named(recipe.task)
    config = model_config(recipe.model, task)
    data = task.open_data(recipe, config)
    fit_vocabulary(recipe.model, config, data)
    with settings_errors("the model cannot be built from model, lora and compression"), torch.device("meta"):
        model = build_model(recipe.model.model_copy(update={"name": None, "config": {}}), config, data, task)
        compression = recipe.compression
        if compression is not None and recipe.budget is not None:
            compression = Budget(recipe.budget, model, compression, total_steps(recipe, data), recipe.seed, task.size(recipe)).compression
        return cost_rows(CostModel(model, compression, task.size(recipe)))


def cost_of_model(folder: str) -> dict[str, Any]:
    """Cost of a saved model for rows as in its recipe; without a recipe, for rows of its family's default size."""
    if not Path(folder).is_dir():
        raise RecipeError(f"--model {folder} is not a folder: name a run folder, or the folder of a model or adapter")
    run, size = RunFolder.of(folder), None
    try:
        model = load_model(folder)
    except FileNotFoundError as error:
        raise RecipeError(f"--model {error}") from None
    if run.recipe.is_file():
        recipe = run.read_recipe()
        size = task_named(recipe.task).size(recipe)
    return cost_rows(CostModel(model, size=size))


def cost_rows(model: CostModel) -> dict[str, Any]:
    """Cost of one row, in all and by layer, JSON-able."""
    cost = model()
    return {
        "tokens": model.main.tokens,
        "macs": cost.macs,
        "dense_macs": cost.dense_macs,
        "macs_ratio": cost.macs_ratio,
        "mean_token_fraction": cost.mean_token_fraction,
        "embed_macs": round(sum(shape.rows * shape.embed_macs for shape in model.shapes.values())),
        "head_macs": round(
            sum(shape.rows * (shape.head_macs + shape.head_macs_per_token * shape.tokens) for shape in model.shapes.values())
        ),
        "activation_bytes": cost.activation_bytes,
        "dense_activation_bytes": cost.dense_activation_bytes,
        "kv_bytes": cost.kv_bytes,
        "dense_kv_bytes": cost.dense_kv_bytes,
        "layers": [row for name, shape in model.shapes.items() for row in _layers(name, shape, model, cost)],
    }


def _layers(stack: str, shape: StackShape, model: CostModel, cost: Cost) -> list[dict[str, Any]]:
    """A row for each layer of a stack."""
    windows, whole = shape.windows or (None,) * shape.layers, shape.dense_layers()
    at: dict[int, list[str]] = {}
    for stage in model.stages:
        if stage.config.stack == stack:
            at.setdefault(stage.config.layer, []).append(stage.config.key)
    return [
        {
            "stack": stack or None,
            "layer": str(index),
            "stage": ", ".join(at.get(index, [])) or None,
            "tokens": tokens.attention,
            "mlp_tokens": tokens.mlp,
            "macs": shape.rows * (shape.layer_macs(tokens, windows[index]) + shape.taps.get(index, 0) * tokens.mlp),
            "dense_macs": shape.rows * (shape.layer_macs(whole[index], windows[index]) + shape.taps.get(index, 0) * whole[index].mlp),
            "stage_macs": sum(cost.stage_macs[name] for name in at.get(index, [])),
        }
        for index, tokens in enumerate(cost.stacks.get(stack, whole))
    ]


def bench_recipe(loaded: LoadedRecipe, console: Console) -> dict[str, Any]:
    """Measures a recipe's training step with random weights, and prints the table."""
    measured = bench_models({"compressed": build(loaded.recipe)}, loaded.recipe, console)
    arm = measured.arms["compressed"]
    unit = task_named(loaded.recipe.task).unit
    table = Table(title=f"training step of {measured.amount:,} {unit}, {measured.rounds} paired rounds")
    for column in ("arm", "median", "dense ÷ this", "% of oracle speed", "memory a step"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    table.add_row("dense", f"{measured.dense_seconds * 1000:.0f} ms", "1.00×", "–", f"{measured.memory['dense'] / 2**20:.0f} MiB")
    table.add_row(
        "compressed",
        f"{arm.seconds * 1000:.0f} ms",
        f"{arm.speedup.median:.2f}× ({arm.speedup.low:.2f}–{arm.speedup.high:.2f})",
        f"{100 * arm.of_oracle.median:.1f} ({100 * arm.of_oracle.low:.1f}–{100 * arm.of_oracle.high:.1f})",
        f"{measured.memory['compressed'] / 2**20:.0f} MiB",
    )
    table.add_row(
        "oracle",
        f"{arm.oracle_seconds * 1000:.0f} ms",
        "–",
        f"{100 * arm.control.median:.1f} (control)",
        f"{measured.memory['compressed/oracle'] / 2**20:.0f} MiB",
    )
    console.print(table)
    console.print(
        f"claimed: speed-up {arm.claimed_speedup:.2f}×, {100 * arm.claimed_of_oracle:.1f} % of oracle speed "
        "(lower 95 % bounds less the control's half-width); ranges are 95 % intervals of the median",
        highlight=False,
        soft_wrap=True,
    )
    return measured.to_dict()
