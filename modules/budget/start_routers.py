"""Routers before the first training step: scorers fitted to what their layers do, thresholds set to the requested keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backbones.stack import sharded
from ..stage import Stage, stages_of
from ..tokens.trace import Trace

# Tokens of a stage that scorers are fitted to.
TOKENS = 8192
# (model, batch, trace=…) -> anything: one forward.
Run = Callable[..., Any]


def _call(model: PreTrainedModel, batch: Mapping[str, Any], trace: Trace) -> Any:
    return model(**batch, trace=trace)


@torch.no_grad()
def start_routers(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], run: Run = _call, seed: int = 0) -> dict[str, float]:
    """Fits scorers that predict the updates of their layers, and sets thresholds so that stages keep what they request.

    The model's own weights do not change, and no random number is drawn. A stage that is trained already is left as it is.

    Args:
        model: compressed model.
        batches: a few batches of training data, on the model's device.
        run: one forward; by default ``model(**batch, trace=trace)``.
        seed: seed of random scores.

    Returns:
        Rank correlation of fitted scores with the sizes of updates, over held-out tokens, by stage name.

    Raises:
        ValueError: a scorer has to be fitted and the weights are partitioned (ZeRO-3).
    """
    stages, given, training = stages_of(model), list(batches), model.training
    model.train(False)
    try:
        found = _fit({name: stage for name, stage in stages.items() if needs_fit(stage)}, model, given, run, seed)
        _calibrate([stage for stage in stages.values() if stage.needs_threshold], model, given, run, seed)
    finally:
        model.train(training)
    return found


def needs_fit(stage: Stage) -> bool:
    """The scorer predicts updates and is not fitted yet."""
    return stage.scorer.fits_updates and not bool(getattr(stage.scorer, "fitted", False))


def _fit(stages: Mapping[str, Stage], model: PreTrainedModel, batches: list[Mapping[str, Any]], run: Run, seed: int) -> dict[str, float]:
    if not stages:
        return {}
    if any(sharded(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None):
        raise ValueError(
            f"stages {', '.join(stages)}: scorer 'update' is fitted on whole weights, which deepspeed_3 partitions: fit it in a short run "
            "with trainer.strategy=deepspeed_2 and start from it, or take scorer 'linear'"
        )
    tokens: dict[str, list[Tensor]] = {name: [] for name in stages}
    sizes: dict[str, list[Tensor]] = {name: [] for name in stages}
    each = max(1, TOKENS // max(1, len(batches)))
    everything = {name: 1.0 for name, stage in stages_of(model).items() if stage.bypass and not stage.config.left_out}
    for number, batch in enumerate(batches):
        trace = Trace(seed=seed, step=number, keep=everything, updates=True)
        run(model, batch, trace=trace)
        for name in stages:
            routing = trace.routings[name]
            assert routing.update is not None
            real = routing.routable & routing.update.real
            rows = routing.update.tokens[real]
            # From all over the batch.
            places = torch.linspace(0, len(rows) - 1, min(each, len(rows)), device=rows.device).long()
            tokens[name].append(rows[places])
            sizes[name].append(routing.update.size[real][places])
    return {name: stage.scorer.fit(torch.cat(tokens[name]), torch.cat(sizes[name])) for name, stage in stages.items()}


def _calibrate(stages: list[Stage], model: PreTrainedModel, batches: list[Mapping[str, Any]], run: Run, seed: int) -> None:
    """Thresholds as after a few training batches: decisions by rank, which they follow."""
    if not stages:
        return
    for stage in stages:
        stage.selector.train()
    for number, batch in enumerate(batches):
        run(model, batch, trace=Trace(seed=seed, step=number, lookahead=True))
    for stage in stages:
        stage.selector.eval()
