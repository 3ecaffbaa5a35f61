"""The plot of a probe: rise of the loss without each layer and half, by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..show.figures import plain, save
from .part import SITES

# Columns of the probe's rows that are rises of the loss.
_RISES = (*SITES.values(), "random half")


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG.

    Args:
        rows: result of ``Probe.rows``.
        title: title of the picture.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    depths = list(range(len(rows)))
    for name in _RISES:
        values = [(depth, row[name]) for depth, row in zip(depths, rows, strict=True) if row.get(name) is not None]
        if values:
            axes.plot(*zip(*values, strict=True), marker="o", markersize=3, label=name)
    # One layer may be worth a hundred times another.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xticks(depths, [str(row["layer"]) for row in rows], fontsize=7)
    axes.set_xlabel("layer")
    axes.set_ylabel("rise of the loss (nats)")
    axes.set_title(plain(title), fontsize=10)
    axes.legend(fontsize=8)
    save(figure, [path], dpi=120)
