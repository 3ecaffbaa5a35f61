"""What every metric is while it is being counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...data.splits import Splits


class Quality:
    """A metric while it is being counted: what can be summed over batches and ranks before anything is divided."""

    def add(self, out: Any, batch: Mapping[str, Any]) -> None:
        """Counts one batch.

        Args:
            out: what the model answered.
            batch: that it answered to, on the same device.
        """
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        """Adds what another rank counted."""
        raise NotImplementedError

    @property
    def value(self) -> float:
        """The metric."""
        raise NotImplementedError

    def details(self, data: Splits) -> dict[str, Any]:
        """What the report's ``quality`` says beside the metric, JSON-able."""
        return {}
