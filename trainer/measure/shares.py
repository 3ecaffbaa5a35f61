"""Keeps of many stages in one line or one cell."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# More of them would widen a table beyond a terminal.
_SHOWN = 4


def shares(keep: Mapping[str, float], static: Collection[str] = (), cell: bool = False) -> str:
    """Keeps of the stages that choose tokens, or of more than four their smallest, mean and largest, and the number of static stages.

    Args:
        keep: requested or achieved keep by stage.
        static: names of the static stages. They are not found by a keep of 0, which a router that lets no token pass has too.
        cell: one value a line, for a narrow cell of a table.

    Returns:
        The text; "–" without any stage.
    """
    values = [value for name, value in keep.items() if name not in static]
    shown = [f"{value:.3f}" for value in values]
    if len(values) > _SHOWN:
        shown = [f"min {min(values):.3f}", f"mean {sum(values) / len(values):.3f}", f"max {max(values):.3f}"]
    left_out = [f"{len(keep) - len(values)} static"] if len(values) < len(keep) else []
    if cell:
        return "\n".join(shown + left_out) or "–"
    return ", ".join([*([" ".join(shown)] if shown else []), *left_out]) or "–"


def static_of(requested: Mapping[str, float]) -> list[str]:
    """Names of the stages that request a keep of 0, which static ones alone may."""
    return [name for name, value in requested.items() if value == 0]
