"""Curves of a run, from the files that its loggers wrote."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..run_folder import RunFolder

# Points of a curve that a page holds.
POINTS = 240


@dataclass(frozen=True)
class Curve:
    """A value over training.

    Attributes:
        steps: optimizer steps, rising.
        values: finite value at each of them.
        last: the value at the end, of the last step alone.
    """

    steps: list[float]
    values: list[float]
    last: float


def curves_of(run: RunFolder) -> dict[str, Curve]:
    """Curves of a run by tag: from TensorBoard's event files, otherwise from CSV files, otherwise none.

    The steps that a resumed run repeats count as they were in the end. A curve with more than POINTS values becomes means of neighbours.
    """
    found = _of_events(run.tensorboard) if run.tensorboard.is_dir() else {}
    if not found:
        found = _of_csv(run)
    return {tag: curve for tag, points in found.items() if (curve := _curve(points)) is not None}


def _of_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing import event_accumulator as events

    # Every scalar, and no more of the rest than has to be.
    sizes = {events.SCALARS: 0, events.TENSORS: 0, events.IMAGES: 1, events.HISTOGRAMS: 1, events.COMPRESSED_HISTOGRAMS: 1}
    accumulator = events.EventAccumulator(str(folder), size_guidance=sizes, purge_orphaned_data=False)
    accumulator.Reload()
    # By time: files that were begun within one second are read by their names, whose last number is ordered as text.
    scalars = {tag: sorted(accumulator.Scalars(tag), key=lambda event: event.wall_time) for tag in accumulator.Tags()[events.SCALARS]}
    return {tag: [(event.step, event.value) for event in found] for tag, found in scalars.items()}


def _of_csv(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Points of the files of all times that the run was started, the first time first. Lines that a kill has cut are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    starts = {path: path.parent.name.removeprefix("version_") for path in run.csv.glob("version_*/metrics.csv")}
    for path in sorted((path for path, number in starts.items() if number.isdecimal()), key=lambda path: int(starts[path])):
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            # A null character is an error for the reader.
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                for tag, value in row.items():
                    if tag is None or tag == "step" or not value:
                        continue
                    try:
                        point = int(row["step"]), float(value)
                    except (KeyError, TypeError, ValueError):
                        continue
                    found.setdefault(tag, []).append(point)
    return found


def _curve(points: Iterable[tuple[int, float]]) -> Curve | None:
    """The last value of each step, thinned; None if none is finite."""
    # What a resumed run repeats replaces what it was, also by a value that is not finite.
    kept = sorted((step, value) for step, value in dict(points).items() if math.isfinite(value))
    if not kept:
        return None
    groups = min(len(kept), POINTS)
    bounds = [len(kept) * group // groups for group in range(groups + 1)]
    parts = [kept[low:high] for low, high in itertools.pairwise(bounds)]
    steps, values = ([sum(point[side] for point in part) / len(part) for part in parts] for side in (0, 1))
    return Curve(steps, values, kept[-1][1])
