"""Everything of a recipe that can be checked without training: keys, paths, columns, layers, budgets, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from ..modules.budget.budget import Budget
from ..modules.cost import CostModel
from .build import build_model, model_config, open_data, total_steps
from .distillation import check_teacher
from .recipe import Recipe
from .strategies import check as check_strategy
from .tasks.base import task_named


@dataclass(frozen=True)
class Checked:
    """What a valid recipe amounts to.

    Attributes:
        parameters: of the model, stages included.
        steps: optimizer steps.
        classes: of the data.
        train_rows: of the data.
        keep: resolved keep by stage.
        tokens: of each layer.
        macs_ratio: of the compressed forward; 1 for a dense recipe.
        memory_bytes: estimate for training on one process: weights, gradients, AdamW, an average, a teacher and activations of a batch.
    """

    parameters: int
    steps: int
    classes: int
    train_rows: int
    keep: dict[str, float]
    tokens: list[int]
    macs_ratio: float
    memory_bytes: int


def validate(recipe: Recipe) -> Checked:
    """Checks a recipe against its real config and data; weights are neither loaded nor made.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    check_strategy(recipe)
    task = task_named(recipe.task)
    task.check(recipe)
    config = model_config(recipe.model, task)
    data = open_data(recipe, config)
    steps = total_steps(recipe, data)
    teacher = None
    if recipe.distillation is not None:
        teacher = check_teacher(recipe.distillation, recipe.model, config, data.classes)
    with torch.device("meta"):
        model = build_model(recipe.model.model_copy(update={"name": None, "config": {}}), config, data, task)
        compression = recipe.compression
        if compression is not None and recipe.budget is not None:
            compression = Budget(recipe.budget, model, compression, steps, recipe.seed).compression
        cost_model = CostModel(model, compression)
    cost = cost_model()
    parameters = sum(p.numel() for module in (model, *cost_model.stages) for p in module.parameters())
    # Weights, gradients and two moments; one more copy where they are averaged.
    weights = parameters * (16 if recipe.trainer.ema is None else 20)
    if teacher is not None:
        with torch.device("meta"):
            weights += 4 * sum(p.numel() for p in AutoModelForImageClassification.from_config(teacher).parameters())
    activations = cost.activation_bytes * recipe.data.batch_size // (2 if recipe.trainer.precision == "bf16" else 1)
    rows: Any = data.train
    return Checked(
        parameters=parameters,
        steps=steps,
        classes=len(data.classes),
        train_rows=len(rows),
        keep=dict(cost.keep),
        tokens=[tokens.attention for tokens in cost.layers],
        macs_ratio=cost.macs_ratio,
        memory_bytes=weights + activations,
    )
