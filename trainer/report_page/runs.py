"""What a page shows of a run: its results, curves, recipe and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...modules.checkpoints.whole_files import DamagedFile
from ..errors import RecipeError, first_fault
from ..measure.bench import Bench
from ..measure.report import Arm, Report
from ..recipe.plain_yaml import read_file
from ..run_folder import ARMS, RunFolder
from .curves import Curve, curves_of

# Keys of the report's quality that are not values of the trained model.
_NOT_DETAILS = ("metric", "higher_is_better", "split", "dense", "compressed")


@dataclass(frozen=True)
class LayerCost:
    """A layer of ``Report.cost``, for one row.

    Attributes:
        layer: its number.
        stack: its stack; None in a model that has one.
        stage: names of its stages.
        tokens: tokens in attention.
        mlp_tokens: tokens in the MLP.
        macs: MACs of the layer without its stages.
        dense_macs: MACs of the layer in the dense model.
        stage_macs: MACs of its stages.
    """

    layer: str
    stack: str | None
    stage: str | None
    tokens: float
    mlp_tokens: float
    macs: float
    dense_macs: float
    stage_macs: float


@dataclass(frozen=True)
class Ended:
    """The report of a run that has ended.

    Attributes:
        report: all of it.
        rows: rows of the table of results by name: the run itself first, its control arms below.
        bench: the paired measurement; None if there was none.
        layers: cost by layer; empty for a model that cannot be counted.
    """

    report: Report
    rows: Mapping[str, Arm]
    bench: Bench | None
    layers: Sequence[LayerCost]


@dataclass(frozen=True)
class Shown:
    """A run, or a control arm of one.

    Attributes:
        name: name on the page, different from all others.
        run: its folder.
        settings: its recipe, key by key.
        curves: by tag.
        ended: its report; None of a control arm, and of a run that has not ended.
        control: whether it is a control arm of the page's only run.
    """

    name: str
    run: RunFolder
    settings: Mapping[str, str]
    curves: Mapping[str, Curve]
    ended: Ended | None = None
    control: bool = False


def read_runs(folders: Sequence[str | Path]) -> list[Shown]:
    """The runs of a page; a single run has its control arms with it.

    Args:
        folders: folders of runs, finished or not, or of exports.

    Raises:
        RecipeError: one is no run, or is given twice.
        DamagedFile: a report is damaged.
    """
    runs = []
    for folder in folders:
        run = RunFolder(RunFolder.of(folder).path)
        if not run.recipe.is_file():
            raise RecipeError(f"{folder} has no {run.recipe.name}: name the folder of a run")
        if any(run.path.resolve() == other.path.resolve() for other in runs):
            raise RecipeError(f"{folder} is given twice: name every run once")
        runs.append(run)
    names = [run.path.resolve().name for run in runs]
    alone = len(runs) == 1
    found = [_shown(name if names.count(name) == 1 else str(run.path), run, alone) for name, run in zip(names, runs, strict=True)]
    if not alone:
        return found
    names_of_arms = {arm.recipe: name for name, arm in found[0].ended.rows.items()} if found[0].ended is not None else {}
    for recipe in sorted((runs[0].path / ARMS).glob(f"*/{runs[0].recipe.name}")):
        arm = RunFolder(recipe.parent)
        found.append(Shown(names_of_arms.get(arm.path.name, arm.path.name), arm, _settings(arm), curves_of(arm), control=True))
    return found


def _shown(name: str, run: RunFolder, alone: bool) -> Shown:
    read = run.read_report()
    try:
        ended = None if read is None else _ended(name, read, alone)
    except ValidationError as error:
        raise DamagedFile(f"{run.report} is damaged, or of another version: {first_fault(error)}; train again") from None
    return Shown(name, run, _settings(run), curves_of(run), ended)


def _ended(name: str, read: Mapping[str, Any], alone: bool) -> Ended:
    report = TypeAdapter(Report).validate_python(read)
    arms = TypeAdapter(dict[str, Arm]).validate_python(report.baselines)
    bench = TypeAdapter(Bench | None).validate_python(report.step_time.get("paired"))
    layers = TypeAdapter(list[LayerCost]).validate_python(report.cost.get("layers", []))
    # The names of arms alone, where they are no other run's.
    shown = {key if alone and key != name else f"{name}: {key}": arm for key, arm in arms.items()}
    return Ended(report, {name: _own(report), **shown}, bench, layers)


def _own(report: Report) -> Arm:
    """The run itself as a row of the results."""
    own = "dense" if report.quality.get("compressed") is None else "compressed"
    return TypeAdapter(Arm).validate_python(
        {
            "recipe": report.recipe,
            "quality": _measured(report.quality.get(own)),
            "keep": {kind: {key: _measured(value) for key, value in keep.items()} for kind, keep in report.keep.items()},
            "macs_ratio": _measured(report.macs_ratio),
            "mean_token_fraction": _measured(report.mean_token_fraction),
            "macs_ratio_requested": report.macs_ratio_requested,
            "mean_token_fraction_requested": report.mean_token_fraction_requested,
            "train_seconds": _measured(report.train_seconds),
            "per_second": report.throughput.get("per_second"),
            "train_macs_ratio": report.train_macs_ratio,
            "step_seconds": report.step_time.get(own),
            "speedup": report.step_time.get("speedup"),
            "of_oracle": report.step_time.get("of_oracle"),
            "memory": report.peak_memory.get(own),
            "details": {key: value for key, value in report.quality.items() if key not in _NOT_DETAILS},
            "parameters": report.parameters,
            "stacks": report.stacks,
            "fitted": report.fitted,
            "gradients": report.gradients,
            "step_time": report.step_time.get("target") or {},
            "remarks": report.remarks,
        }
    )


def _measured(value: float | None) -> float:
    """NaN for a value that was not measured."""
    return math.nan if value is None else value


def _settings(run: RunFolder) -> dict[str, str]:
    """The recipe as ``key.path`` and value; of any version, since nothing is built from it."""
    return {key: "–" if value is None else str(value) for key, value in flat(read_file(run.recipe)).items()}


def flat(value: Any, path: str = "", join: str = ".") -> dict[str, Any]:
    """Nested mappings, and lists of them, as ``key.path`` and value.

    Args:
        value: the mappings.
        path: path that leads to the value.
        join: what stands between the keys of a path.
    """
    if isinstance(value, Mapping) and value:
        parts: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        parts = enumerate(value)
    else:
        return {path: value}
    return {key: leaf for name, item in parts for key, leaf in flat(item, f"{path}{join}{name}" if path else str(name), join).items()}
