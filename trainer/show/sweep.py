"""Quality of one set of weights over a range of keeps, as a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...modules.checkpoints.whole_files import write_json
from ..errors import RecipeError
from .figures import plain, save
from .target import check_target

# Keeps of a sweep, and the least one that its decimals allow.
_POINTS, _LEAST = 10, 0.001


def swept(sweep: str) -> list[float]:
    """Ten keeps from ``LOWEST:HIGHEST``, both included, with three decimals.

    Raises:
        RecipeError: it is no such range.
    """
    ends = sweep.split(":")
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise RecipeError(f"--sweep {sweep} must be LOWEST:HIGHEST, two keeps: 0.1:1 for example") from None
    if not 0 < low < high <= 1:
        raise RecipeError(f"--sweep {sweep}: keeps must be in (0, 1], the lowest first: the fraction that is kept, not removed")
    if low < _LEAST:
        raise RecipeError(f"--sweep {sweep}: keeps have three decimals, so that the lowest must be at least {_LEAST:g}")
    return [round(low + (high - low) * point / (_POINTS - 1), 3) for point in range(_POINTS)]


def check_plot(path: Path, keeps: Sequence[float]) -> None:
    """Raises RecipeError if there is nothing to draw, the file is of another kind or cannot be written, or the data would replace other ones."""
    if not keeps:
        raise RecipeError("--plot draws the keeps that are measured: give --sweep 0.1:1, or --keep several times")
    if path.suffix not in (".png", ".svg"):
        raise RecipeError(f"--plot {path} must end in .png or .svg; both are written, and the data beside them as .json")
    check_target("--plot", path.with_suffix(".json"), ("target", "variants"))


def write_data(result: Mapping[str, Any], path: Path) -> Path:
    """Writes the result of ``evaluate`` as JSON beside its plot; returns the file."""
    file = path.with_suffix(".json")
    write_json(file, result)
    return file


def draw(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Draws the result of ``evaluate``: the measured keeps as a line over their MACs, everything else as single points.

    Args:
        result: result of ``evaluate`` with several keeps.
        path: file to write; the same name with the other ending is written too.

    Returns:
        The two files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, metric = figure.add_subplot(), result["metric"]
    points = {name: (item["macs_ratio"], item[metric]) for name, item in result["variants"].items()}
    line = sorted(point for name, point in points.items() if name.startswith("keep "))
    axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label="the same weights at other keeps")
    for name, point in points.items():
        if not name.startswith("keep "):
            axes.plot(*point, marker="s", linestyle="", label="as trained" if name == "compressed" else plain(name))
    axes.set(xlabel="macs_ratio (MACs ÷ dense)", ylabel=metric.replace("_", " "), xlim=(0, 1.05))
    axes.set_title(plain(f"{result['target']}, {result['split']} split"), fontsize=9)
    axes.legend(fontsize=8)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    save(figure, written, dpi=150)
    return written
