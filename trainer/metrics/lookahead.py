"""Quality with non-causal decisions, and how well a causal predictor agrees with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...modules.tokens.trace import Trace
from .quality import Quality


@dataclass
class LookAhead:
    """Non-causal evaluation, on the same batches as the causal one.

    Attributes:
        quality: metric with decisions that depend on later tokens.
        agreement: sum, over batches and stages, of the share of tokens on which the predictor agrees with these decisions.
        stages: number of terms in ``agreement``.
    """

    quality: Quality
    agreement: float = 0.0
    stages: int = 0

    def add(self, out: Any, batch: Mapping[str, Any], trace: Trace) -> None:
        """Counts one batch."""
        self.quality.add(out, batch)
        found = [float(routing.agreement) for routing in trace.routings.values() if routing.agreement is not None]
        self.agreement, self.stages = self.agreement + sum(found), self.stages + len(found)

    def merge(self, other: LookAhead) -> None:
        """Adds the counts of another rank."""
        self.quality.merge(other.quality)
        self.agreement, self.stages = self.agreement + other.agreement, self.stages + other.stages

    def details(self, metric: str) -> dict[str, Any]:
        """Values for the report."""
        return {metric: self.quality.value, "agreement": self.agreement / self.stages if self.stages else None}
