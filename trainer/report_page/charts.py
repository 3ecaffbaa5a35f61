"""Line charts as SVG, in colours of the page, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from matplotlib.ticker import MaxNLocator

from .curves import Curve
from .markup import number, tag

# Colours that the page has for lines.
COLOURS = 6
# Size of a chart in units of its own; a telephone shows about one of them as a pixel.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 200, 58, 12, 8, 22
# Points that a curve has at most where each of them is marked.
_MARKED = 12


@dataclass(frozen=True)
class Line:
    """A curve in a chart.

    Attributes:
        label: name in the legend.
        curve: what is drawn.
        colour: number of the run, which decides the colour.
        stroke: solid, dashed or dotted.
    """

    label: str
    curve: Curve
    colour: int
    stroke: str = "solid"


def line_chart(title: str, lines: Sequence[Line]) -> Element:
    """A figure with its title, its lines over the steps, and a legend with the value at the end of each."""
    steps = [step for line in lines for step in line.curve.steps]
    values = [value for line in lines for value in line.curve.values]
    across, up = _range(0.0, max(steps)), _range(min(values), max(values), 0.05)
    svg = tag(
        "svg",
        _grid(across, up),
        (_drawn(line, across, up) for line in lines),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} over training steps; at the end: " + ", ".join(f"{line.label} {number(line.curve.last)}" for line in lines),
    )
    legend = tag("ul", (_entry(line) for line in lines), kind="legend")
    return tag("figure", tag("h4", title), svg, tag("figcaption", legend), kind="chart")


def _range(low: float, high: float, margin: float = 0.0) -> tuple[float, float]:
    """The ends of an axis, apart from each other."""
    room = (high - low) * margin or (0.0 if high > low else abs(high) * 0.1 or 1.0)
    return low - room, high + room


def _x(step: float, across: tuple[float, float]) -> float:
    return _LEFT + (step - across[0]) / (across[1] - across[0]) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, up: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (value - up[0]) / (up[1] - up[0]) * (_HEIGHT - _TOP - _BOTTOM)


def _ticks(ends: tuple[float, float]) -> list[float]:
    return [float(value) for value in MaxNLocator(4).tick_values(*ends) if ends[0] <= value <= ends[1]]


def _grid(across: tuple[float, float], up: tuple[float, float]) -> list[Element]:
    found = []
    for value in _ticks(up):
        y = f"{_y(value, up):.1f}"
        found.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, kind="rule"))
        found.append(tag("text", number(value), x=_LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
    for value in _ticks(across):
        found.append(tag("text", f"{value:,.5g}", x=f"{_x(value, across):.1f}", y=_HEIGHT - 6, text_anchor="middle"))
    return found


def _drawn(line: Line, across: tuple[float, float], up: tuple[float, float]) -> list[Element]:
    points = [(_x(step, across), _y(value, up)) for step, value in zip(line.curve.steps, line.curve.values, strict=True)]
    kind = f"line c{line.colour % COLOURS} {line.stroke}"
    found = [tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), kind=kind)]
    if len(points) <= _MARKED:
        found += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, kind=f"point c{line.colour % COLOURS}") for x, y in points]
    return found


def _entry(line: Line) -> Element:
    swatch = tag(
        "svg",
        tag("line", x1=0, x2=22, y1=5, y2=5, kind=f"line c{line.colour % COLOURS} {line.stroke}"),
        viewBox="0 0 22 10",
        kind="swatch",
        aria_hidden="true",
    )
    return tag("li", swatch, tag("span", line.label), tag("span", number(line.curve.last), kind="last"))
