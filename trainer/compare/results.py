"""Results of a comparison: what the reports of its runs say, by arm, with paired differences."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ...modules.checkpoints.whole_files import DamagedFile
from ..measure.shares import shares, static_of
from .arms import Arm
from .job import Job
from .statistics import Mean, difference


@dataclass(frozen=True)
class ArmResult:
    """Results of one arm over the seeds.

    Attributes:
        kind: name of the arm without its ratio.
        seeds: the seeds, in the order of the values below.
        values: the metric on held-out data, by seed.
        quality: their mean.
        difference: mean difference to the reference arm, paired by seed; None for the reference itself.
        requested: mean over seeds of the requested keep, by stage.
        achieved: mean over seeds of the achieved keep, by stage.
        macs_ratio: MACs of a forward ÷ those of the recipe's dense model, by seed, from the token counts of the held-out rows.
        train_seconds: seconds of training steps with loading, by seed.
        steps: optimizer steps of a run.
    """

    kind: str
    seeds: Sequence[int]
    values: Sequence[float]
    quality: Mean
    difference: Mean | None
    requested: Mapping[str, float]
    achieved: Mapping[str, float]
    macs_ratio: Sequence[float]
    train_seconds: Sequence[float]
    steps: int

    @property
    def macs(self) -> Mean:
        """``macs_ratio`` over the seeds."""
        return Mean.of(self.macs_ratio)

    @property
    def seconds(self) -> Mean:
        """``train_seconds`` over the seeds."""
        return Mean.of(self.train_seconds)

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a training step, with loading."""
        return self.seconds.mean / self.steps


@dataclass(frozen=True)
class Comparison:
    """The results of all arms.

    Attributes:
        recipe: name of the recipe.
        metric: name of the metric.
        higher_is_better: direction of the metric.
        split: split that the metric is of.
        reference: arm that the differences are to.
        equal: what the arms have alike: ``steps`` or ``time``.
        arms: results by arm.
    """

    recipe: str
    metric: str
    higher_is_better: bool
    split: str
    reference: str
    equal: str
    arms: Mapping[str, ArmResult]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        data = asdict(self)
        for name, arm in self.arms.items():
            data["arms"][name] |= {"macs": asdict(arm.macs), "seconds": asdict(arm.seconds), "step_seconds": arm.step_seconds}
        return data

    def csv(self) -> str:
        """One line a run."""
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        out.writerow(["arm", "seed", self.metric, "macs_ratio", "train_seconds", "steps"])
        for name, arm in self.arms.items():
            for row in zip(arm.seeds, arm.values, arm.macs_ratio, arm.train_seconds, strict=True):
                out.writerow([name, *row, arm.steps])
        return text.getvalue()

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(next(iter(self.arms.values())).seeds)

    @property
    def title(self) -> str:
        """What the table shows."""
        metric = self.metric.replace("_", " ")
        # Arms may have been given lengths of their own.
        differ = self.equal == "steps" and len({arm.steps for arm in self.arms.values()}) > 1
        alike = "different steps" if differ else f"equal {self.equal}"
        return f"{self.recipe}: {metric} on {self.split} data, {self.seeds} seed{'s' * (self.seeds > 1)}, {alike}"

    @property
    def columns(self) -> list[str]:
        """Headers of the table."""
        quality, to = f"{self.metric.replace('_', ' ')}\nmean", f"to {self.reference}\n(paired, 95 %)"
        return ["arm", quality, "min – max", to, "keep\nrequested", "keep\nachieved", "macs_\nratio", "steps", "train\ns", "train\nstep"]

    def rows(self) -> list[list[str]]:
        """Cells of the table, a row an arm."""
        return [
            [
                name,
                f"{arm.quality.mean:.4f}",
                f"{arm.quality.low:.4f} – {arm.quality.high:.4f}",
                _difference(arm.difference),
                shares(arm.requested, static_of(arm.requested), cell=True),
                shares(arm.achieved, static_of(arm.requested), cell=True),
                f"{arm.macs.mean:.3f}",
                f"{arm.steps:,}",
                f"{arm.seconds.mean:,.0f}",
                f"{1000 * arm.step_seconds:.0f} ms",
            ]
            for name, arm in self.arms.items()
        ]

    def table(self) -> Table:
        """The table for a terminal."""
        out = Table(title=self.title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
        for header in self.columns:
            out.add_column(header, justify="left" if header == "arm" else "right", no_wrap=True)
        for row in self.rows():
            out.add_row(*row)
        return out


def results_of(recipe: str, arms: Sequence[Arm], jobs: Sequence[Job], scale: Mapping[str, float], reference: str, equal: str) -> Comparison:
    """Reads the reports of all runs.

    Args:
        recipe: name of the recipe.
        arms: the arms.
        jobs: their trainings, all of which have ended.
        scale: by arm, dense MACs of its model ÷ those of the recipe's.
        reference: arm that the differences are to.
        equal: what the arms have alike.

    Raises:
        DamagedFile: a report is damaged.
    """
    of_arm = {arm.name: [job for job in jobs if job.arm == arm.name] for arm in arms}
    runs = {name: [_Run.of(job) for job in of_this] for name, of_this in of_arm.items()}
    values = {name: [run.value for run in of_this] for name, of_this in runs.items()}
    results = {
        arm.name: ArmResult(
            kind=arm.kind,
            seeds=[job.seed for job in of_arm[arm.name]],
            values=values[arm.name],
            quality=Mean.of(values[arm.name]),
            difference=None if arm.name == reference else difference(values[arm.name], values[reference]),
            requested=_mean_keep([run.requested for run in runs[arm.name]]),
            achieved=_mean_keep([run.achieved for run in runs[arm.name]]),
            macs_ratio=[run.macs_ratio * scale[arm.name] for run in runs[arm.name]],
            train_seconds=[run.seconds for run in runs[arm.name]],
            steps=of_arm[arm.name][0].steps,
        )
        for arm in arms
    }
    first = runs[arms[0].name][0]
    return Comparison(recipe, first.metric, first.higher_is_better, first.split, reference, equal, results)


@dataclass(frozen=True)
class _Run:
    """What a comparison reads of a report."""

    metric: str
    higher_is_better: bool
    split: str
    value: float
    requested: Mapping[str, float]
    achieved: Mapping[str, float]
    macs_ratio: float
    seconds: float

    @staticmethod
    def of(job: Job) -> _Run:
        """The report of a training that has ended. Raises DamagedFile if it is damaged."""
        report = job.run.read_report() or {}
        try:
            quality, keep = report["quality"], report["keep"]
            requested, achieved = ({stage: float(value) for stage, value in keep[kind].items()} for kind in ("requested", "achieved"))
            return _Run(
                metric=str(quality["metric"]),
                higher_is_better=bool(quality["higher_is_better"]),
                split=str(quality["split"]),
                value=float(quality["dense"] if quality["compressed"] is None else quality["compressed"]),
                requested=requested,
                achieved=achieved,
                macs_ratio=float(report["macs_ratio"]),
                seconds=float(report["train_seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(
                f"{job.run.report} is damaged, or of another version ({type(error).__name__}: {error}): delete {job.run.path} and repeat the "
                "command, which trains this run again"
            ) from None


def _mean_keep(keeps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over runs of the keep of each stage."""
    return {stage: sum(keep[stage] for keep in keeps) / len(keeps) for stage in keeps[0]}


def _difference(found: Mean | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:+.4f}" + ("" if found.interval is None else f" ± {found.interval:.4f}")
