"""Tables of what runs reached: quality, ratios, times and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from ..measure.report import Arm, Report
from ..measure.shares import shares, static_of
from .markup import number, table, tag
from .runs import Shown, flat

_MEMORY = {"cuda_peak": "peak on the device", "saved_for_backward": "bytes saved for backward"}


def results(runs: Sequence[Shown]) -> list[Element]:
    """Everything that ended runs report: one table of all, and a table for each kind of further values."""
    ended = [shown.ended for shown in runs if shown.ended is not None]
    reports = [item.report for item in ended]
    rows = {name: arm for item in ended for name, arm in item.rows.items()}
    if not rows:
        return [tag("p", "No run has ended yet.")]
    return [_all(reports, rows), *_speeds(runs), tag("div", _further(rows), kind="grid")]


def _all(reports: Sequence[Report], rows: Mapping[str, Arm]) -> Element:
    metrics, splits, units, kinds = (
        sorted({str(item) for item in found if item is not None})
        for found in (
            [report.quality.get("metric") for report in reports],
            [report.quality.get("split") for report in reports],
            [report.throughput.get("unit") for report in reports],
            [report.peak_memory.get("kind") for report in reports],
        )
    )
    memory = ", ".join(_MEMORY.get(kind, kind) for kind in kinds)
    header = [
        "run",
        " or ".join(metrics).replace("_", " "),
        "keep requested",
        "keep achieved",
        "macs_ratio requested",
        "macs_ratio achieved",
        "training step",
        "speed-up",
        "of oracle speed",
        f"memory a step{f' ({memory})' if memory else ''}",
        "training time",
        f"{' or '.join(units) or 'rows'}/s in training",
    ]
    body = [
        [
            name,
            number(arm.quality, ".4f"),
            *(shares(arm.keep.get(kind, {}), static_of(arm.keep.get("requested", {}))) for kind in ("requested", "achieved")),
            number(arm.macs_ratio_requested, ".3f"),
            number(arm.macs_ratio, ".3f"),
            number(None if arm.step_seconds is None else arm.step_seconds * 1000, ",.1f", " ms"),
            number(arm.speedup, ".2f", "×"),
            number(None if arm.of_oracle is None else arm.of_oracle * 100, ".1f", " %"),
            number(None if arm.memory is None else arm.memory / 2**20, ",.1f", " MiB"),
            number(arm.train_seconds, ",.0f", " s"),
            number(arm.per_second, ",.0f"),
        ]
        for name, arm in rows.items()
    ]
    split = f" on {' or '.join(splits)} data" if splits else ""
    return table(f"Quality{split}, achieved ratios, and training steps measured in pairs", header, body)


def _speeds(runs: Sequence[Shown]) -> list[Element]:
    """The paired measurement of each run, with intervals."""
    found = []
    for shown in runs:
        bench = shown.ended.bench if shown.ended is not None else None
        if bench is None or not bench.arms:
            continue
        header = ["arm", "median", "oracle", "speed-up", "of oracle speed", "control", "speed-up at least", "of oracle speed at least"]
        body = [
            [
                name,
                *(number(seconds * 1000, ",.1f", " ms") for seconds in (arm.seconds, arm.oracle_seconds)),
                *(f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})" for ratio in (arm.speedup, arm.of_oracle, arm.control)),
                *(number(claimed, ".3f") for claimed in (arm.claimed_speedup, arm.claimed_of_oracle)),
            ]
            for name, arm in bench.arms.items()
        ]
        title = f"Training step of {shown.name}: {bench.rounds} paired rounds; in brackets 95 % intervals of the median"
        found.append(table(title, header, body))
    return found


def _further(rows: Mapping[str, Arm]) -> list[Element]:
    """Values by kind, length, stack, stage …: a table for each group of the report, a column for each run that has it."""
    values = {name: _values(arm) for name, arm in rows.items()}
    groups = list(dict.fromkeys(group for found in values.values() for group in found))
    tables = []
    for group in groups:
        having = [name for name in rows if group in values[name]]
        keys = list(dict.fromkeys(key for name in having for key in values[name][group]))
        body = [[key, *(number(values[name][group].get(key)) for name in having)] for key in keys]
        tables.append(table(group.replace("_", " "), ["", *having], body))
    return tables


def _values(arm: Arm) -> dict[str, dict[str, Any]]:
    """Numbers by group and key; lists are left out."""
    nested = {
        "keep": arm.keep if len(arm.keep.get("requested", {})) > 1 else {},
        "stacks": arm.stacks,
        "parameters": {group: counts for group, counts in arm.parameters.items() if counts.get("total")},
        "rank correlation of fitted scorers": arm.fitted.get("scorers", {}),
        "share of the updates that shortcuts predict": arm.fitted.get("shortcuts", {}),
        "norm of the gradient": arm.gradients,
        "step time": arm.step_time,
        "further values": {
            "mean token fraction": arm.mean_token_fraction,
            "mean token fraction, requested": arm.mean_token_fraction_requested,
            "macs_ratio, mean over training": arm.train_macs_ratio,
            **{key: value for key, value in arm.details.items() if not isinstance(value, Mapping | list)},
        },
        **{key: value for key, value in arm.details.items() if isinstance(value, Mapping)},
    }
    found = {
        group: {key: leaf for key, leaf in flat(value, join=" · ").items() if _shown(leaf)} for group, value in nested.items() if value
    }
    return {group: leaves for group, leaves in found.items() if leaves}


def _shown(leaf: Any) -> bool:
    return leaf is not None and not isinstance(leaf, list | Mapping) and not (isinstance(leaf, float) and math.isnan(leaf))
