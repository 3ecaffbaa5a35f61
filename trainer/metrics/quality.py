"""The interface of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...data.rows import BadRows
from ...data.splits import Splits


class Quality:
    """A metric in the making: values that are summed over batches and ranks before the final division."""

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        """Counts one batch.

        Args:
            out: output of the model.
            batch: input of the model, on the same device.
        """
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        """Adds the counts of another rank."""
        raise NotImplementedError

    @property
    def value(self) -> float:
        """Value of the metric."""
        raise NotImplementedError

    def details(self, data: Splits) -> dict[str, Any]:
        """Further values of the report's ``quality`` block, JSON-able."""
        return {}


def mean(total: float, number: int, what: str) -> float:
    """The mean of counted values. Raises BadRows if there are none: a mean over nothing is no result.

    Args:
        total: sum of the values.
        number: number of values.
        what: name of a value, plural.
    """
    if not number:
        raise BadRows(f"no {what} were counted, so there is no metric: check the rows of data.validation_split and data.test_split")
    return total / number
