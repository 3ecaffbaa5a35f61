"""The page of a comparison: its table and plot, and the runs of its first seed side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report_page.markup import table
from ..report_page.page import picture, write_page
from .job import Job
from .results import Comparison


def write(found: Comparison, jobs: Sequence[Job], plot: Path, to: Path) -> None:
    """Writes one self-contained HTML page.

    Args:
        found: the results.
        jobs: the trainings, all of which have ended.
        plot: PNG of the plot.
        to: file to write.
    """
    rows = found.rows()
    means = ": means over seeds with 95 % intervals" if found.seeds > 1 else ""
    text = f"{found.metric.replace('_', ' ')} against MACs of a forward and seconds of training{means}"
    marked = [place for place, name in enumerate(found.arms) if name == found.reference]
    section = [table(found.title, [" ".join(name.split()) for name in found.columns], rows, marked=marked), picture(plot, text)]
    write_page([job.run.path for job in jobs if job.seed == jobs[0].seed], to, {"Comparison": section})
