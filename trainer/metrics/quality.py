"""The interface of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
