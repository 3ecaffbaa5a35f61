"""Routers of a run before its first step: fitted scorers and calibrated thresholds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ...data.rows import on_device
from ...modules.budget.start_routers import Fitted, needs_fit, start_routers
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..distributed.deepspeed import stage_of
from ..errors import RecipeError
from ..probe.meter import batches_of
from ..tasks.base import task_named
from .parts import RunParts


def started(parts: RunParts) -> Fitted:
    """Fits scorers and shortcuts that predict updates and sets thresholds of causal models, on ``trainer.start_rows`` training rows.

    Every process does the same on the same rows.

    Raises:
        RecipeError: a scorer or a shortcut has to be fitted, and the model is partitioned or there are no batches for it.
    """
    recipe, model, stages = parts.recipe, parts.model, stages_of(parts.model)
    fits = [name for name, stage in stages.items() if needs_fit(stage)]
    if not fits and not any(stage.needs_threshold for stage in stages.values()):
        return Fitted()
    partitioned = stage_of(recipe.trainer) == 3
    if fits and (partitioned or not recipe.trainer.start_rows):
        why = "trainer.strategy = 'deepspeed_3' partitions the weights" if partitioned else "trainer.start_rows = 0"
        raise RecipeError(
            f"stages {', '.join(fits)}: scorer 'update' and shortcuts are fitted before the first step, and {why}: take deepspeed_2 and start_rows=32, or "
            "start from a run in which they were fitted, or take scorer 'linear' and no shortcut"
        )
    if partitioned or not recipe.trainer.start_rows:
        # The first training batch sets the thresholds.
        return Fitted()
    task, place = task_named(recipe.task), model.device
    if torch.cuda.is_available():
        model.to("cuda")
    batches = [on_device(batch, model.device) for batch in batches_of(parts.data, recipe.trainer.start_rows, recipe.data.batch_size)]

    def run(model: PreTrainedModel, batch: dict[str, Any], trace: Trace) -> Any:
        trace.sample_ids = batch["sample_ids"]
        return task.forward(model, batch, trace=trace)

    found = start_routers(model, batches, run, recipe.seed)
    model.to(place)
    return found
