"""The page of a comparison: its table and plot, and the runs of its first seed side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..report_page.markup import table, tag
from ..report_page.page import picture, write_page
from .job import Job
from .results import Comparison


def write(found: Comparison, jobs: Sequence[Job], scale: Mapping[str, float], plot: Path, to: Path) -> None:
    """Writes one self-contained HTML page.

    Args:
        found: the results.
        jobs: the trainings, all of which have ended.
        scale: by arm, dense MACs of its model ÷ those of the recipe's.
        plot: PNG of the plot.
        to: file to write.
    """
    rows = found.rows()
    means = ": means over seeds with 95 % intervals" if found.seeds > 1 else ""
    text = f"{found.metric.replace('_', ' ')} against MACs of a forward and seconds of training{means}"
    marked = [place for place, name in enumerate(found.arms) if name == found.reference]
    section = [table(found.title, [" ".join(name.split()) for name in found.columns], rows, marked=marked), picture(plot, text)]
    section.append(tag("p", f"From here on: the runs of seed {jobs[0].seed}, side by side.", kind="soft"))
    if other := [name for name in found.arms if scale[name] != 1]:
        section.append(
            tag(
                "p",
                f"There the macs_ratio of {', '.join(other)} is to its own dense model; in the table above to the recipe's.",
                kind="soft",
            )
        )
    write_page([job.run.path for job in jobs if job.seed == jobs[0].seed], to, {"Comparison": section}, f"Comparison of {found.recipe}")
