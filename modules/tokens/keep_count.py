"""KeepCount: tokens kept over several forwards."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..cost.cost import CostModel
from ..cost.stack_use import StackUse, ratio_of
from .trace import Trace


@dataclass
class KeepCount:
    """Achieved keep by stage over several forwards, summed over all rows before dividing, so that it does not depend on how rows are batched.

    Attributes:
        totals: routable tokens (kept, present) by stage name.
        rows: number of rows.
        uses: StackUse by stack name.
        layers: number of layers of each stack with stages, by name.
    """

    totals: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: int = 0
    uses: dict[str, StackUse] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    def add(self, trace: Trace, cost: CostModel, rows: int) -> None:
        """Adds the counts of one forward.

        Args:
            trace: Trace of the forward. Without an image no stage of a tower or projector has run.
            cost: cost model of the model.
            rows: rows of the batch; a stage of a tower has images instead.
        """
        totals = {name: routing.counts() for name, routing in trace.routings.items()}
        self.merge(KeepCount(totals, rows, cost.uses(trace), cost.layers))

    def clear(self) -> None:
        """Resets all counts."""
        self.totals.clear()
        self.uses.clear()
        self.rows = 0

    def merge(self, other: KeepCount) -> None:
        """Adds the counts of other forwards, for example of another rank."""
        for name, (kept, present) in other.totals.items():
            before = self.totals.get(name, (0, 0))
            self.totals[name] = (before[0] + kept, before[1] + present)
        for name, use in other.uses.items():
            self.uses[name] = self.uses.get(name, StackUse()) + use
        self.rows, self.layers = self.rows + other.rows, {**self.layers, **other.layers}

    @property
    def achieved(self) -> dict[str, float]:
        """Routable tokens leaving ÷ entering, by stage name; 1 where none entered, because nothing was dropped."""
        return {name: kept / present if present else 1.0 for name, (kept, present) in self.totals.items()}

    @property
    def macs_ratio(self) -> float:
        """MACs of all rows ÷ those in the dense model; 1 if there are no rows, as for a dense model."""
        return ratio_of(self.uses, "macs_ratio", self.layers)

    @property
    def mean_token_fraction(self) -> float:
        """Tokens that a layer processes ÷ those in the dense model, of all rows, mean over layers; likewise."""
        return ratio_of(self.uses, "mean_token_fraction", self.layers)
