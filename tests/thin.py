"""Which pairs of a matrix a test runs over whose property does not depend on the pair, but on the family or on the method alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeVar

import pytest


class Named(Protocol):
    """A method of a matrix."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def thinned(pairs: Sequence[tuple[str, Row]], families: Collection[str], methods: Collection[str] = ()) -> list[tuple[str, Row]]:
    """Every method with these families, and these methods with every family.

    Raises:
        ValueError: there is no such family or method, so that nothing would be tested.
    """
    missing = (set(families) - {family for family, _ in pairs}) | (set(methods) - {method.name for _, method in pairs})
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))}: no family or method of these pairs")
    return [(family, method) for family, method in pairs if family in families or method.name in methods]


def pairs(every: Sequence[tuple[str, Any]], often: Sequence[tuple[str, Any]]) -> pytest.MarkDecorator:
    """Parametrizes families and methods; slow where others show the same."""
    marked = [
        pytest.param(family, method, id=f"{family}-{method.name}", marks=() if (family, method) in often else pytest.mark.slow)
        for family, method in every
    ]
    return pytest.mark.parametrize(("family", "method"), marked)
