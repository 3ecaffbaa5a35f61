"""One pass of a model over held-out data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ...data.rows import BadRowCount, collate, on_device
from ...data.splits import Splits
from ...modules.cost.cost import CostModel
from ...modules.stage import stages_of
from ...modules.tokens.keep_count import KeepCount
from ...modules.tokens.trace import Trace
from ..metrics.kept_places import KeptPlaces
from ..metrics.predictions import PredictionLog
from ..recipe.schema import Recipe
from ..tasks.base import Task


@dataclass(frozen=True)
class Evaluated:
    """Results of one variant of the weights.

    Attributes:
        quality: the task's metric on the held-out split.
        keep: achieved keep by stage.
        macs_ratio: MACs of all rows ÷ those in the dense model.
        mean_token_fraction: tokens of all rows likewise, mean over layers.
        latency: median seconds of the forward of a full batch; None if no batch was full.
        position_bias: where kept tokens lie, by stage: ``KeptPlaces.bias``.
        remarks: what to know of the quality, one line each.
        log: predictions; without any for a task whose outputs are none.
    """

    quality: float
    keep: Mapping[str, float]
    macs_ratio: float
    mean_token_fraction: float
    latency: float | None
    position_bias: Mapping[str, Any]
    remarks: Sequence[str]
    log: PredictionLog


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        lookahead: decisions may depend on later tokens.
        decider: model whose decisions are taken; None for the model's own.
        keep: keep of every stage; None for their own.
    """

    lookahead: bool = False
    decider: PreTrainedModel | None = None
    keep: float | None = None


@torch.no_grad()
def measured(model: PreTrainedModel, data: Splits, recipe: Recipe, task: type[Task], cost: CostModel | None, way: Way) -> Evaluated:
    """Runs a model over the test split.

    Args:
        model: dense or compressed model, on its device.
        data: the splits.
        recipe: recipe of the data.
        task: its task.
        cost: cost model of the model; None for a family without an adapter.
        way: how it is run.

    Raises:
        BadRows: more rows are bad than the recipe allows.
    """
    device, compressed = model.device, bool(stages_of(model))
    loader = DataLoader(data.test, batch_size=recipe.data.eval_batch_size, collate_fn=collate, num_workers=recipe.data.workers)
    bad, quality, kept, seconds = BadRowCount(recipe.data.max_bad_fraction, len(loader.dataset)), task.quality(), KeepCount(), []  # type: ignore[arg-type]
    places, log = KeptPlaces(), PredictionLog()
    requested = {} if way.keep is None else {name: way.keep for name, stage in stages_of(model).items() if not stage.config.left_out}
    for given in loader:
        bad.add(given["rows"], given["bad"])
        if "sample_ids" not in given:
            continue
        batch = on_device(given, device)
        trace = Trace(seed=recipe.seed, sample_ids=batch["sample_ids"], lookahead=way.lookahead, keep=requested)
        if way.decider is not None:
            # Control scores do not depend on the tokens' values, so a separate forward gives the same decisions.
            chosen = Trace(seed=recipe.seed, sample_ids=batch["sample_ids"])
            task.forward(way.decider, batch, trace=chosen)
            trace.replay = chosen.decisions()
        start = time.perf_counter()
        out = task.forward(model, batch, **({"trace": trace} if compressed else {}))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if len(batch["sample_ids"]) == loader.batch_size:
            seconds.append(time.perf_counter() - start)
        quality.add(out, batch)
        log.add(task.predictions(model, out, batch))
        if compressed and cost is not None:
            kept.add(trace, cost, len(batch["sample_ids"]))
            places.add(task.kept_cells(model, trace, batch))
    return Evaluated(
        quality=quality.value,
        keep=kept.achieved,
        macs_ratio=kept.macs_ratio,
        mean_token_fraction=kept.mean_token_fraction,
        latency=statistics.median(seconds) if seconds else None,
        position_bias=places.bias,
        remarks=quality.remarks(data),
        log=log,
    )
