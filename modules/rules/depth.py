"""Layers of a stage that a config gives relative to the depth of a stack: a fraction, or a span of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# "a:b" as in a slice of the layers; each end an index, a fraction or nothing.
_SPAN = re.compile(r"(\d+|0?\.\d+)?:(\d+|0?\.\d+)?")
# Depths below it are tried to say how many layers some stages need.
_DEEPEST = 257


def check_layer(layer: Any) -> None:
    """Raises ValueError unless a stage can be at this layer: an index, a fraction of the layers, or a span of them."""
    if isinstance(layer, bool) or not (
        isinstance(layer, int) or (isinstance(layer, float) and 0 < layer < 1) or (isinstance(layer, str) and _SPAN.fullmatch(layer))
    ):
        raise ValueError(
            f"compression.stages[].layer = {layer!r} must be an integer, the index of a layer from 0, or a fraction of the layers "
            "between 0 and 1, or a span of them, ':' for all or '0.5:' for the upper half"
        )


def check_neighbours(layer: Any, share: Any, follows: Any, spread: Any) -> None:
    """Raises ValueError unless these values of a stage's ``layer``, ``share``, ``follows`` and ``spread`` are possible."""
    where = "compression.stages[]"
    if not isinstance(share, bool) or (share and not isinstance(layer, str)):
        raise ValueError(
            f"{where}.share = {share!r} must be true or false, and true is one decision for a span or list of layers, not {layer!r}"
        )
    if follows is not None:
        check_layer(follows)
        if isinstance(follows, str):
            raise ValueError(f"{where}.follows = {follows!r} must be one layer, an index or a fraction of the layers")
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread < math.inf:
        raise ValueError(f"{where}.spread = {spread!r} must be a number of at least 0, in units of the scores")


def check_depth(sites: Mapping[str, Sequence[float | str]], depth: int, stack: str) -> None:
    """Checks the layers of a stack's stages that are given relative to its depth.

    Args:
        sites: fractions and spans by site.
        depth: number of the stack's layers.
        stack: name of the stack.

    Raises:
        ValueError: a span has no layer, or two fractions at one site are the same layer.
    """
    if _fit(sites, depth):
        return
    layers = ", ".join(str(layer) for site in sites.values() for layer in site)
    below = max(number for number in range(_DEEPEST) if not _fit(sites, number))
    needed = "" if below + 1 == _DEEPEST else f": {below + 1} layers or more are needed"
    raise ValueError(
        f"compression.stages[].layer = {layers}: {stack or 'the backbone'} has {depth} layers, too few for a layer of each{needed}; take a "
        "deeper model, another method, or the index of a layer for each stage"
    )


def _fit(sites: Mapping[str, Sequence[float | str]], depth: int) -> bool:
    """True if in a stack of so many layers each span has one, and each fraction at a site one of its own."""
    for layers in sites.values():
        single = [_index(layer, depth) for layer in layers if not isinstance(layer, str)]
        if len(set(single)) < len(single) or not all(_span(layer, depth) for layer in layers if isinstance(layer, str)):
            return False
    return True


def layers_at(layer: int | float | str, depth: int) -> list[int]:
    """Indices of a stage's layers.

    Args:
        layer: index; fraction, rounded down; or a span "a:b" of indices or fractions, a included and b not.
        depth: number of layers.

    Raises:
        ValueError: the span has no layer.
    """
    if not isinstance(layer, str):
        return [_index(layer, depth)]
    if not (found := _span(layer, depth)):
        raise ValueError(
            f"compression.stages[].layer = {layer!r} has no layer in a stack of {depth}: make it longer, or leave the stage out"
        )
    return list(found)


def _span(span: str, depth: int) -> range:
    """The layers of a span, none if its ends are the same layer."""
    ends = [None if end is None else float(end) if "." in end else int(end) for end in _ends(span)]
    return range(*(default if end is None else _index(end, depth) for end, default in zip(ends, (0, depth), strict=True)))


def _ends(span: str) -> tuple[str | None, str | None]:
    found = _SPAN.fullmatch(span)
    assert found is not None
    return found[1], found[2]


def _index(layer: int | float, depth: int) -> int:
    # A third of six layers is layer 2, although 0.333 of them is a little less.
    return layer if isinstance(layer, int) else int(layer * depth + 0.01)
