"""Which curves share a chart, and in which order the charts stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from .charts import Line, line_chart
from .curves import POINTS
from .markup import folded, tag
from .runs import Shown

# Titles of groups, with the tags that belong to each; the first that fits counts.
_GROUPS = {
    "Loss and quality": re.compile(r"train/.*loss|val/.*|train/distillation.*"),
    "Gradients": re.compile(r".*grad_norm.*"),
    "Keep": re.compile(r".*keep(_requested|_achieved|_soft)?"),
    "Budget": re.compile(r"budget/.*"),
    "Learning rate and speed": re.compile(r"train/lr.*|train/.*_per_second"),
    "Others": re.compile(r".*"),
}
# Curves that say nothing over training: the epoch, and what the table of results has.
_HIDDEN = re.compile(r"epoch|test/.*")
# Tags of one chart differ in this ending.
_KINDS = {"_achieved": "solid", "_requested": "dashed", "_soft": "dotted"}
# Charts of a group that are shown at once.
_OPEN = 9


def curves(runs: Sequence[Shown]) -> list[Element]:
    """Charts in groups; the curves of all runs lie over each other."""
    grouped: dict[str, dict[str, list[Line]]] = {title: {} for title in _GROUPS}
    for tag_ in dict.fromkeys(name for shown in runs for name in shown.curves):
        if _HIDDEN.fullmatch(tag_):
            continue
        group = next(title for title, tags in _GROUPS.items() if tags.fullmatch(tag_))
        ending = next((ending for ending in _KINDS if tag_.endswith(ending)), "")
        chart = grouped[group].setdefault(tag_.removesuffix(ending), [])
        for place, shown in enumerate(runs):
            if tag_ in shown.curves:
                label = shown.name + (f", {ending[1:]}" if ending else "")
                chart.append(Line(label, shown.curves[tag_], place, _KINDS.get(ending, "solid")))
    found = [element for title, charts in grouped.items() if charts for element in _group(title, charts)]
    if not found:
        return [tag("p", "There are no curves: neither TensorBoard's event files nor CSV files.")]
    note = f"Over optimizer steps; a curve of more than {POINTS} values is drawn as means of neighbours. Beside each name: its last value."
    return [tag("p", note, kind="soft"), *found]


def _group(title: str, charts: dict[str, list[Line]]) -> list[Element]:
    drawn = [line_chart(name, sorted(lines, key=lambda line: line.colour)) for name, lines in charts.items()]
    found = [tag("h3", title), tag("div", drawn[:_OPEN], kind="grid")]
    return found if len(drawn) <= _OPEN else [*found, folded(f"{len(drawn) - _OPEN} more", tag("div", drawn[_OPEN:], kind="grid"))]
