"""The report of a run, as data and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from ...modules.checkpoints.whole_files import write_json
from .bench import Bench
from .shares import shares, static_of

PACKAGES = ("laconic", "torch", "lightning", "transformers", "deepspeed", "datasets", "peft", "tensorboard")


@dataclass(frozen=True)
class Arm:
    """Results of one trained model.

    Attributes:
        recipe: name of the recipe.
        quality: the metric on the reported split.
        details: further values of the task.
        parameters: ``total`` and ``trainable`` parameters of ``lora``, ``routers`` and the ``rest``.
        keep: ``requested`` and ``achieved`` keep by stage.
        stacks: by stack of a vision-language model, ``requested`` and ``achieved`` of ``visual_keep``, visual tokens processed ÷ present
            as a mean over its layers, and of its ``macs_ratio``; empty for other models.
        macs_ratio: MACs of the held-out rows, from the token counts of each, ÷ those in the dense model.
        mean_token_fraction: tokens of the held-out rows likewise, mean over layers.
        train_seconds: seconds of training steps, with loading.
        per_second: images or tokens per second, by the task's unit, over ``train_seconds``; None if nothing was trained.
        train_macs_ratio: MACs of the training steps ÷ those of as many dense steps, from the budget's schedule, the drawn keeps or the
            phases; None for phases of a family without a cost model.
        train_macs: multiply-accumulates of the trained model's forwards, of rows of the configured size, without those of a teacher; None
            without a cost model.
        phases: steps, amount, seconds and MACs of each phase; empty if the run has no phases.
        step_seconds: median time of a training step; None if not measured.
        speedup: dense ÷ this arm, from pairs; None if not measured.
        of_oracle: oracle ÷ this arm, from pairs; None if not measured.
        memory: bytes of a training step; None if not measured.
        macs_ratio_requested: target of the budget, if it is a ``macs_ratio``; None otherwise.
        mean_token_fraction_requested: likewise.
        fitted: ``scorers``, rank correlation with the updates that they were fitted to, and ``shortcuts``, share of the updates' squares that
            they predict, over held-out tokens, by stage; empty if nothing was fitted.
        gradients: ``mean`` and ``largest`` norm of the gradient over the logged steps, before clipping, by the groups of ``parameters``;
            empty with DeepSpeed.
        step_time: for a budget in step time, the Calibration, the ``macs_ratio`` that it gave, and the ``measured`` time of a step ÷ dense at
            the end, with its 95 % interval; empty otherwise.
        remarks: what the reader should change.
    """

    recipe: str
    quality: float
    keep: Mapping[str, Mapping[str, float]]
    macs_ratio: float
    mean_token_fraction: float
    train_seconds: float
    per_second: float | None = None
    train_macs_ratio: float | None = 1.0
    train_macs: int | None = None
    phases: Sequence[Mapping[str, Any]] = ()
    step_seconds: float | None = None
    speedup: float | None = None
    of_oracle: float | None = None
    memory: int | None = None
    macs_ratio_requested: float | None = None
    mean_token_fraction_requested: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    stacks: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    fitted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gradients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    step_time: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """Content of ``report.json``; a value that was not measured is null. ``cost`` is as ``laconic cost`` counts it for one row."""

    recipe: str
    task: str
    quality: Mapping[str, Any]
    keep: Mapping[str, Mapping[str, float | None]]
    macs_ratio: float | None
    mean_token_fraction: float | None
    step_time: Mapping[str, Any]
    peak_memory: Mapping[str, Any]
    baselines: Mapping[str, Any]
    seed: int
    macs_ratio_requested: float | None = None
    mean_token_fraction_requested: float | None = None
    train_seconds: float | None = None
    train_macs_ratio: float | None = None
    train_macs: int | None = None
    phases: Sequence[Mapping[str, Any]] = ()
    throughput: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    stacks: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    fitted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gradients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=lambda: {"format": None, "dtype": None, "max_abs_logit_diff": None})
    bad_rows: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Writes ``report.json``."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Report:
        """What ``save`` wrote."""
        return cls(**json.loads((folder / "report.json").read_text()))


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"platform": platform.platform(), "cores": str(os.cpu_count())}


def with_bench(arm: Arm, name: str, bench: Bench | None) -> Arm:
    """The arm with its measured times and memory."""
    if bench is None:
        return arm
    if name == "dense":
        return replace(arm, step_seconds=bench.dense_seconds, speedup=1.0, memory=bench.memory["dense"])
    if name not in bench.arms:
        # Compressed in training only: the arm is dense now.
        return arm
    times = bench.arms[name]
    found = times.speedup
    met = {"measured": 1 / found.median, "low": 1 / found.high, "high": 1 / found.low} if arm.step_time else {}
    return replace(
        arm,
        step_seconds=times.seconds,
        speedup=found.median,
        of_oracle=times.of_oracle.median,
        memory=bench.memory[name],
        step_time={**arm.step_time, **met},
    )


def table(arms: Mapping[str, Arm], metric: str, memory_kind: str | None) -> Table:
    """A table with one row an arm."""
    title = f"{metric} on held-out data, with training steps measured in pairs"
    # Narrow enough for a terminal of 80 columns.
    out = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    headers = (
        "arm",
        metric,
        "keep\nrequested",
        "keep\nachieved",
        "macs_\nratio",
        "train\nstep",
        "speed\n-up",
        "% of\noracle\nspeed",
        "memory\na step",
    )
    for header in headers:
        # Where the terminal is narrow, long names of arms take two lines, and no figure is cut.
        out.add_column(header, justify="left" if header == "arm" else "right", no_wrap=header != "arm", overflow="fold")
    for name, arm in arms.items():
        requested, achieved = (shares(arm.keep[kind], static_of(arm.keep["requested"]), cell=True) for kind in ("requested", "achieved"))
        out.add_row(
            name,
            f"{arm.quality:.4f}",
            requested,
            achieved,
            f"{arm.macs_ratio:.3f}" + ("" if arm.macs_ratio_requested is None else f"\nof {arm.macs_ratio_requested:.3f}"),
            _shown(arm.step_seconds, lambda value: f"{value * 1000:.0f} ms"),
            _shown(arm.speedup, lambda value: f"{value:.2f}×"),
            _shown(arm.of_oracle, lambda value: f"{100 * value:.1f}"),
            _shown(arm.memory, lambda value: f"{value / 2**20:.0f} MiB"),
        )
    if memory_kind is not None:
        out.caption = {"cuda_peak": "memory: peak on the device", "saved_for_backward": "memory: bytes saved for backward"}[memory_kind]
        out.caption_justify = "left"
    return out


def _shown(value: Any, form: Any) -> str:
    return "–" if value is None else str(form(value))
