"""Routers before the first training step: scorers fitted to what their layers do, thresholds set to the requested keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backbones.stack import sharded
from ..selectors.threshold import ThresholdSelector
from ..stage import Stage, stages_of
from ..tokens.trace import Trace

# Tokens of a stage that scorers and shortcuts are fitted to, and bytes of tokens before and after layers that are held at the same time.
TOKENS, HELD_BYTES = 8192, 2 << 30
# Keeps at which thresholds of other keeps than the own one are measured.
KEEPS = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)
# (model, batch, trace=…) -> anything: one forward.
Run = Callable[..., Any]


def _call(model: PreTrainedModel, batch: Mapping[str, Any], trace: Trace) -> Any:
    return model(**batch, trace=trace)


@dataclass(frozen=True)
class Fitted:
    """How well fitted parts predict tokens that they have not seen, by stage name.

    Attributes:
        scorers: rank correlation of scores with the sizes of updates.
        shortcuts: share of the updates' squares that shortcuts predict.
    """

    scorers: Mapping[str, float] = field(default_factory=dict)
    shortcuts: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scorers or self.shortcuts)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """JSON-able form; empty if nothing was fitted."""
        return {"scorers": dict(self.scorers), "shortcuts": dict(self.shortcuts)} if self else {}


@torch.no_grad()
def start_routers(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], run: Run = _call, seed: int = 0) -> Fitted:
    """Fits scorers and shortcuts that predict the updates of their layers, and sets thresholds so that stages keep what they request.

    The model's own weights do not change, and no random number is drawn. A stage that is trained already is left as it is.

    Args:
        model: compressed model.
        batches: a few batches of training data, on the model's device.
        run: one forward; by default ``model(**batch, trace=trace)``.
        seed: seed of random scores.

    Raises:
        ValueError: a part has to be fitted and the weights are partitioned (ZeRO-3).
    """
    stages, given, training = stages_of(model), list(batches), model.training
    model.train(False)
    try:
        # Parts are fitted to the tokens that shrinking stages leave.
        _calibrate([stage for stage in stages.values() if stage.needs_threshold and not stage.bypass], model, given, run, seed)
        found = _fit({name: stage for name, stage in stages.items() if needs_fit(stage)}, model, given, run, seed)
        _calibrate([stage for stage in stages.values() if stage.needs_threshold], model, given, run, seed)
    finally:
        model.train(training)
    return found


@torch.no_grad()
def calibrate_other_keeps(
    model: PreTrainedModel, names: Sequence[str], batches: Iterable[Mapping[str, Any]], run: Run = _call, seed: int = 0
) -> None:
    """Sets the thresholds of other keeps than the stages' own, measured where these stages have the same one and interpolated between them.

    Args:
        model: compressed model.
        names: stages whose thresholds follow scores; those of their own keeps are set.
        batches: a few batches of data, on the model's device.
        run: one forward; by default ``model(**batch, trace=trace)``.
        seed: seed of random scores.
    """
    stages = {name: stages_of(model)[name] for name in names}
    selectors = {name: stage.selector for name, stage in stages.items() if isinstance(stage.selector, ThresholdSelector)}
    before = {name: copy.deepcopy(selector.state_dict()) for name, selector in selectors.items()}
    given, training = list(batches), model.training
    found: dict[str, dict[float, Tensor]] = {name: {} for name in selectors}
    model.train(False)
    try:
        for keep in KEEPS:
            for selector in selectors.values():
                selector.reset()
            _calibrate(list(stages.values()), model, given, run, seed, dict.fromkeys(stages, keep))
            for name, selector in selectors.items():
                found[name][keep] = selector.levels.clone()
    finally:
        for name, selector in selectors.items():
            selector.load_state_dict(before[name])
        model.train(training)
    for name, selector in selectors.items():
        selector.join_levels(found[name])


def needs_fit(stage: Stage) -> bool:
    """The scorer or the shortcut predicts updates and is not fitted yet."""
    scorer = stage.scorer.fits_updates and not bool(getattr(stage.scorer, "fitted", False))
    return scorer or (stage.shortcut is not None and not stage.shortcut.fitted)


def _fit(stages: Mapping[str, Stage], model: PreTrainedModel, batches: list[Mapping[str, Any]], run: Run, seed: int) -> Fitted:
    if not stages:
        return Fitted()
    if any(sharded(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None):
        raise ValueError(
            f"stages {', '.join(stages)}: scorer 'update' and shortcuts are fitted on whole weights, which deepspeed_3 partitions: fit them in a "
            "short run with trainer.strategy=deepspeed_2 and start from it, or take scorer 'linear' and no shortcut"
        )
    scorers: dict[str, float] = {}
    shortcuts: dict[str, float] = {}
    names = list(stages)
    each = 2 * TOKENS * int(model.config.get_text_config().hidden_size) * model.dtype.itemsize
    together = max(1, HELD_BYTES // each)
    for start in range(0, len(names), together):
        seen = _seen(names[start : start + together], model, batches, run, seed)
        for name, (before, after, sizes) in seen.items():
            stage = stages[name]
            if stage.scorer.fits_updates and not bool(getattr(stage.scorer, "fitted", False)):
                scorers[name] = stage.scorer.fit(before, sizes)
            if stage.shortcut is not None and not stage.shortcut.fitted:
                shortcuts[name] = stage.shortcut.fit(before, after.float() - before.float())
    return Fitted(scorers, shortcuts)


def _seen(
    names: Sequence[str], model: PreTrainedModel, batches: list[Mapping[str, Any]], run: Run, seed: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(P, C) tokens before the layers of these stages and after them, and the (P,) relative sizes of what they add.

    These layers and those after them process every token, and so do earlier ones that are not left out."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    each = max(1, TOKENS // max(1, len(batches)))
    for number, batch in enumerate(batches):
        trace = Trace(seed=seed, step=number, keep=_whole(model), updates=names)
        run(model, batch, trace=trace)
        for name in names:
            routing = trace.routings[name]
            assert routing.update is not None
            real = routing.routable & routing.update.real
            before = routing.update.tokens[real]
            # From all over the batch.
            places = torch.linspace(0, len(before) - 1, min(each, len(before)), device=before.device).long()
            found[name].append((before[places], routing.update.after[real][places], routing.update.size[real][places]))
    return {name: (torch.cat(a), torch.cat(b), torch.cat(c)) for name, parts in found.items() for a, b, c in [zip(*parts, strict=True)]}


def _whole(model: PreTrainedModel) -> dict[str, float]:
    """Keeps with which all layers process every token; those that are left out only until their shortcuts are fitted."""
    return {name: 1.0 for name, stage in stages_of(model).items() if stage.bypass and (not stage.config.left_out or needs_fit(stage))}


def _calibrate(
    stages: list[Stage],
    model: PreTrainedModel,
    batches: list[Mapping[str, Any]],
    run: Run,
    seed: int,
    keeps: Mapping[str, float] | None = None,
) -> None:
    """Thresholds as after a few training batches: decisions by rank, which they follow. Without ``keeps`` other stages that have none yet
    are whole."""
    if not stages:
        return
    for stage in stages:
        stage.selector.train()
    if keeps is None:
        keeps = {} if all(stage.bypass for stage in stages) else _whole(model)
    for number, batch in enumerate(batches):
        run(model, batch, trace=Trace(seed=seed, step=number, keep=keeps, lookahead=True))
    for stage in stages:
        stage.selector.eval()
