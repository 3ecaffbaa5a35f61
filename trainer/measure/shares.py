"""Shares of many stages in one line."""

from __future__ import annotations

from collections.abc import Iterable

# More of them would widen a table beyond a terminal.
_SHOWN = 4


def shares(values: Iterable[float]) -> str:
    """The values, or of more than four their smallest, mean and largest; "–" without any."""
    given = list(values)
    if len(given) <= _SHOWN:
        return " ".join(f"{value:.3f}" for value in given) or "–"
    return f"min {min(given):.3f} mean {sum(given) / len(given):.3f} max {max(given):.3f}"
