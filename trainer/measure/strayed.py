"""Stages that keep another share than they request."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ...modules.stage import Stage

# Shares that differ by more are reported.
FAR = 0.02
_LONGER = "train longer after the schedule of the budget has ended, or give budget.controller a larger rate"


def strayed(
    stages: Iterable[Stage],
    requested: Mapping[str, float],
    achieved: Mapping[str, float],
    folder: str,
    shared: Collection[str] = (),
    ratio: tuple[float, float] | None = None,
) -> list[str]:
    """A line on the stages whose keep is far from the requested one, and what to change; none if there is no such stage.

    Stages that keep a number by rank are left out: they differ by rounding alone.

    Args:
        stages: stages of the model.
        requested: keep by stage.
        achieved: keep by stage on held-out data.
        folder: run folder.
        shared: stages that may share one target of the whole model out among themselves.
        ratio: achieved and requested ``macs_ratio`` of the model, where they do.
    """
    far = [
        stage
        for stage in stages
        if (stage.selector.adaptive or stage.selector.calibrates)
        and abs(achieved.get(stage.config.key, 0) - requested.get(stage.config.key, achieved.get(stage.config.key, 0))) > FAR
    ]
    far = [stage for stage in far if stage.config.key not in shared]
    if not far:
        if shared and ratio is not None and abs(ratio[0] - ratio[1]) > FAR:
            return [f"macs_ratio achieved on held-out data is {ratio[0]:.3f}, and {ratio[1]:.3f} was requested; {_LONGER}"]
        return []
    shown = ", ".join(f"{stage.config.key} {achieved[stage.config.key]:.3f} of {requested[stage.config.key]:.3f}" for stage in far)
    causal = any(stage.selector.calibrates and stage.adapter.causal for stage in far)
    cure = (
        f"laconic calibrate {folder} sets thresholds anew, and a smaller rate of the selector averages over more batches"
        if causal
        else _LONGER
    )
    return [f"keep achieved on held-out data and requested differ by more than {FAR}: {shown}; {cure}"]
