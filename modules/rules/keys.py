"""Keys of the compression block: an unknown one is refused, with the one that is meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

# Keys of other systems that give the removed fraction, the opposite of keep.
_REMOVED_FRACTION = (
    "ratio",
    "drop",
    "drop_rate",
    "drop_ratio",
    "prune",
    "prune_rate",
    "pruning_rate",
    "removed",
    "reduction",
    "sparsity",
    "r",
)


def check_keys(data: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raises ValueError if ``data`` has a key that is none of ``allowed``; ``where`` names it in the message."""
    for key in data:
        if key in allowed:
            continue
        if not isinstance(key, str):
            raise ValueError(f"{where}.{key} is not a key: there are {', '.join(allowed)}")
        if key == "capacity":
            raise ValueError(
                f"{where}.capacity is not a key: give keep, the word at every site; around a layer it is the fraction of tokens processed"
            )
        if key in _REMOVED_FRACTION:
            raise ValueError(f"{where}.{key} is not a key: Laconic counts what is kept; give keep = 1 - removed, in (0, 1]")
        near = difflib.get_close_matches(key, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}.{key} is not a key: there are {', '.join(allowed)}{hint}")
