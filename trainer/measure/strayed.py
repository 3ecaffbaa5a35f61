"""Stages, or a whole model, that keep another share than requested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...modules.stage import Stage
from .cures import Cures, any_of

# Shares that differ by more are reported.
FAR = 0.02
_LONGER = "train longer after the schedule of the budget has ended"


def strayed(
    stages: Iterable[Stage],
    requested: Mapping[str, float],
    achieved: Mapping[str, float],
    folder: str,
    cures: Cures | None = None,
    measured: Mapping[str, float] | None = None,
) -> list[str]:
    """A line on the stages whose keep is far from the requested one, and what to change; none if there is no such stage.

    Stages that keep a number by rank are left out: they differ by rounding alone. Those that share one target of the model out among
    themselves are held to the model's measure.

    Args:
        stages: stages of the model.
        requested: keep by stage.
        achieved: keep by stage on held-out data.
        folder: run folder.
        cures: of the run.
        measured: ``macs_ratio`` and ``mean_token_fraction`` on held-out data.
    """
    cures = cures or Cures()
    budget = cures.budget
    one = budget is not None and budget.config.measure != "keep"
    shared = {stage.config.key for stage in budget.held} if budget is not None and one else set()
    far = [
        stage
        for stage in stages
        if (stage.selector.adaptive or stage.selector.calibrates)
        and stage.config.key not in shared
        and abs(achieved.get(stage.config.key, 0) - requested.get(stage.config.key, achieved.get(stage.config.key, 0))) > FAR
    ]
    found = []
    if far:
        shown = ", ".join(f"{stage.config.key} {achieved[stage.config.key]:.3f} of {requested[stage.config.key]:.3f}" for stage in far)
        found.append(f"keep achieved on held-out data and requested differ by more than {FAR}: {shown}; {_cure(far, folder, cures)}")
    if budget is not None and shared and measured is not None:
        measure, target = budget.config.measure, budget.config.target
        if abs(measured[measure] - target) > FAR:
            cure = any_of([_LONGER, *cures.controller("larger")])
            found.append(f"{measure} achieved on held-out data is {measured[measure]:.3f}, and {target:.3f} was requested; {cure}")
    return found


def _cure(stages: list[Stage], folder: str, cures: Cures) -> str:
    """What to change so that these stages keep what is requested."""
    if any(stage.selector.calibrates and stage.adapter.causal for stage in stages):
        return f"laconic calibrate {folder} sets thresholds anew, and a smaller rate of the selector averages over more batches"
    if any(stage.selector.needs_probabilities for stage in stages):
        return any_of([_LONGER, *cures.controller("larger", *stages)])
    return (
        "their thresholds hold the share of the training rows, and the held-out ones score differently: a smaller rate of the selector averages "
        "over more batches, and selector top_k keeps the requested number in every row"
    )
