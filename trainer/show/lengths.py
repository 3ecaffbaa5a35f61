"""The table and the plot of training steps at several lengths."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ..measure.lengths import ARMS, Exponent, Lengths
from .figures import plain, save


def lengths_table(found: Lengths) -> Table:
    """A row for each length, and one of the fitted exponents."""
    rounds = max((point.bench.rounds for point in found.measured if point.bench is not None), default=0)
    table = Table(title=f"{found.name}: training step of {found.rows:,} rows, {rounds} paired rounds; medians, with memory a step")
    for column in (
        f"length ({found.unit})",
        *(("tokens",) if found.unit != "tokens" else ()),
        *ARMS,
        "dense ÷ compressed",
        "% of oracle speed",
    ):
        table.add_column(column, justify="right")
    for point in found.points:
        names = [f"{point.length:,}", *([f"{point.tokens:,}"] if found.unit != "tokens" else [])]
        if point.bench is None:
            table.add_row(*names, point.reason)
            continue
        times = point.bench.arms["compressed"]
        table.add_row(
            *names,
            *(f"{point.seconds(arm) * 1000:,.1f} ms\n{point.memory(arm) / 2**20:,.1f} MiB" for arm in ARMS),
            f"{times.speedup.median:.2f}× ({times.speedup.low:.2f}–{times.speedup.high:.2f})",
            f"{100 * times.of_oracle.median:.1f} ({100 * times.of_oracle.low:.1f}–{100 * times.of_oracle.high:.1f})",
        )
    exponents = [f"{_shown(found.exponent(arm, 'seconds'))} in time\n{_shown(found.exponent(arm, 'memory'))} in memory" for arm in ARMS]
    table.add_row("power of tokens", *([""] if found.unit != "tokens" else []), *exponents, "", "")
    return table


def draw_lengths(found: Lengths, to: Path) -> list[Path]:
    """Draws the plot as PNG and SVG.

    Args:
        found: the result.
        to: JSON file that the plots are written beside.

    Returns:
        The two files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    tokens = [point.tokens for point in found.measured]
    for axes, what, scale, label in zip(
        figure.subplots(1, 2), ("seconds", "memory"), (1e3, 2**-20), ("ms a training step", "MiB a training step"), strict=True
    ):
        for number, arm in enumerate(ARMS):
            values = [getattr(point, what)(arm) * scale for point in found.measured]
            power = f"{arm}: tokens to the power {_shown(found.exponent(arm, what))}"
            axes.plot(
                tokens, values, color=f"C{number}", marker="osD"[number], markersize=5, linestyle=("-", "-", "--")[number], label=power
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(plain(f"{found.name}, {found.rows:,} rows a step"), fontsize=10)
    plots = [to.with_suffix(".png"), to.with_suffix(".svg")]
    save(figure, plots, dpi=150)
    return plots


def _shown(found: Exponent | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:.2f}" if found.interval is None else f"{found.value:.2f} ± {found.interval:.2f}"
