"""What a run was: cost by layer, configuration, versions."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from .markup import number, table, tag
from .runs import Shown, flat

# Width of the longest bar, in rem.
_BAR = 7


def cost_by_layer(shown: Shown) -> Element | None:
    """A bar a layer: MACs of one row, beside those of the dense model. None without a report, and of models that cannot be counted."""
    if shown.ended is None or not shown.ended.layers:
        return None
    cost, layers = shown.ended.report.cost, shown.ended.layers
    most = max(max(layer.dense_macs, layer.macs + layer.stage_macs) for layer in layers) or 1.0
    body = [
        [
            f"{layer.stack} {layer.layer}" if layer.stack else layer.layer,
            layer.stage or "",
            number(layer.tokens, ",.1f"),
            number(layer.mlp_tokens, ",.1f"),
            _bar(layer.macs + layer.stage_macs, layer.dense_macs, most),
            number((layer.macs + layer.stage_macs) / 1e6, ",.3g"),
            number(layer.dense_macs / 1e6, ",.3g"),
        ]
        for layer in layers
    ]
    ratio, fraction = (number(cost.get(key), ".3f") for key in ("macs_ratio", "mean_token_fraction"))
    header = ["layer", "stages", "tokens in attention", "tokens in MLP", "MACs", "million MACs", "dense"]
    return table(f"{shown.name}: macs_ratio {ratio}, mean token fraction {fraction}", header, body, texts=2, fold=False)


def _bar(value: float, dense: float, most: float) -> Element:
    """A bar as long as the dense layer costs, filled as far as the compressed one does."""
    share = value / dense if dense else 1.0
    filled = tag("i", style=f"width:{100 * min(1.0, share):.1f}%")
    width = f"width:{_BAR * max(value, dense) / most:.2f}rem"
    return tag("span", filled, kind="bar", style=width, role="img", aria_label=f"{100 * share:.0f} % of dense")


def configuration(runs: Sequence[Shown]) -> list[Element]:
    """The recipes: keys whose values differ between runs, and all keys."""
    keys = list(dict.fromkeys(key for shown in runs for key in shown.settings))
    values = {key: [shown.settings.get(key, "–") for shown in runs] for key in keys}
    differing = {key: found for key, found in values.items() if len(set(found)) > 1}
    header = ["key", *(shown.name for shown in runs)]
    whole = table("Recipe", header, [[key, *found] for key, found in values.items()], len(header), [keys.index(key) for key in differing])
    if len(runs) == 1:
        return [whole]
    if not differing:
        return [tag("p", "The recipes are equal."), whole]
    return [table("Keys that differ", header, [[key, *found] for key, found in differing.items()], len(header), fold=False), whole]


def versions(runs: Sequence[Shown]) -> list[Element]:
    """Versions of packages, and facts about the data."""
    reports = [(shown.name, shown.ended.report) for shown in runs if shown.ended is not None]
    found = []
    for title, of_runs in (
        ("Versions", {name: dict(report.versions) for name, report in reports}),
        ("Data", {name: flat(report.data) | {"bad rows": report.bad_rows} for name, report in reports}),
    ):
        keys = list(dict.fromkeys(key for items in of_runs.values() for key, value in items.items() if value not in (None, [], {}, "")))
        values = [[key, *(number(items.get(key)) for items in of_runs.values())] for key in keys]
        if values:
            marked = [place for place, (_, *row) in enumerate(values) if len(set(row)) > 1]
            found.append(table(title, ["", *of_runs], values, len(of_runs) + 1, marked))
    return found
