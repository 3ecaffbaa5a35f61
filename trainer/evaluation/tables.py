"""The tables of ``laconic evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..measure.shares import shares

# Stages whose kept places are listed; of more, those with the largest bias.
_STAGES = 8
_HALVES = ("rows", "columns", "length")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a result of ``evaluate``: variants, where kept tokens lie, throughput."""
    found = [_variants(result)]
    places = result["variants"].get("compressed", {}).get("position_bias")
    if places:
        found.append(_places(places))
    if result["throughput"]["batch_sizes"]:
        found.append(_throughput(result["throughput"]))
    return found


def _variants(result: Mapping[str, Any]) -> Table:
    groups, metric, reference = result["groups"], result["metric"], result["reference"]
    about = "" if groups is None else _about(groups, reference)
    table = Table(title=f"{result['target']}: the same weights, {result['split']} split{about}")
    columns = ["run as", metric.replace("_", " "), "keep achieved", "macs_ratio", "forward of a batch"]
    columns += ["position bias"] if any(item["position_bias"] for item in result["variants"].values()) else []
    columns += ["agreement", "right, hard", "right, easy"] if groups is not None else []
    for column in columns:
        table.add_column(column)
    for name, item in result["variants"].items():
        row = [
            f"{name}{_input(item['input'])}",
            f"{item[metric]:.4f}",
            shares(item["keep"], result["static"], cell=True),
            f"{item['macs_ratio']:.3f}",
            "–" if item["latency"] is None else f"{item['latency'] * 1000:.0f} ms",
        ]
        if "position bias" in columns:
            row.append(f"{max(map(_bias, item['position_bias'].values())):.3f}" if item["position_bias"] else "–")
        if groups is not None:
            beside = item["against_reference"] or {}
            row += [_share(beside.get(key)) for key in ("agreement", "hard", "easy")]
        table.add_row(*row)
    return table


def _about(groups: Mapping[str, Any], reference: str) -> str:
    apart = "that smaller images lose, or keep" if groups["by"] == "downsampled" else "with the smaller margins, or the larger ones"
    dense = "dense" if reference == "dense" else reference
    return f"\nhard and easy: {groups['hard']:,} and {groups['easy']:,} right predictions of {dense} {apart}"


def _input(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    took = f", {facts['time_ratio']['median']:.2f} of its time" if "time_ratio" in facts else ""
    return f" ({facts['size']:,} of {facts['whole']:,} {facts['unit']}{took})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _bias(places: Mapping[str, Any]) -> float:
    """The largest of a stage's distances."""
    return max(float(places[half]) for half in _HALVES if half in places)


def _places(places: Mapping[str, Any]) -> Table:
    most = sorted(places, key=lambda stage: _bias(places[stage]), reverse=True)[:_STAGES]
    shown = [stage for stage in places if stage in most]
    left = f", the {len(shown)} of {len(places)} stages with the largest bias" if len(shown) < len(places) else ""
    table = Table(title=f"where kept tokens lie: shares of four equal parts, 0.25 each without a preference{left}")
    for column in ("stage", "position bias", "from top to bottom, or start to end", "from left to right"):
        table.add_column(column)
    for stage in shown:
        item = places[stage]
        bands = [item.get("by_row", item.get("by_part")), item.get("by_column")]
        table.add_row(stage, f"{_bias(item):.3f}", *("–" if band is None else " ".join(f"{share:.2f}" for share in band) for band in bands))
    return table


def _throughput(found: Mapping[str, Any]) -> Table:
    unit, both = found["unit"], found["unit"] == "tokens"
    table = Table(title="forwards in evaluation, medians of paired rounds; ranges are 95 % intervals of the median")
    for column in ("rows", "run as", "forward", *(("rows/s",) if both else ()), f"{unit}/s", "dense ÷ this"):
        table.add_column(column, justify="left" if column == "run as" else "right")
    for rows, speeds in found["batch_sizes"].items():
        if speeds is None:
            table.add_row(str(rows), "not enough memory", *([""] * (len(table.columns) - 2)))
            continue
        for name, speed in speeds.items():
            ratio = speed["speedup"]
            table.add_row(
                str(rows),
                name,
                f"{speed['seconds'] * 1000:,.1f} ms",
                *((f"{speed['rows_per_second']:,.1f}",) if both else ()),
                f"{speed['per_second']:,.0f}",
                f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})",
            )
    return table
