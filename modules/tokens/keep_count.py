"""KeepCount: tokens kept over several forwards."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..cost.cost import CostModel, StackUse
from .trace import Trace


@dataclass
class KeepCount:
    """Achieved keep by stage over several forwards, summed over all rows before dividing.

    Attributes:
        totals: routable tokens (kept, present) by stage name.
        macs: sum of ``macs_ratio`` over the rows.
        fractions: sum of ``mean_token_fraction`` over the rows.
        rows: number of rows in both sums.
        uses: StackUse by stack name, of models of several stacks.
    """

    totals: dict[str, tuple[int, int]] = field(default_factory=dict)
    macs: float = 0.0
    fractions: float = 0.0
    rows: int = 0
    uses: dict[str, StackUse] = field(default_factory=dict)

    def add(self, trace: Trace, cost: CostModel, rows: int) -> None:
        """Adds the counts of one forward.

        Args:
            trace: Trace of the forward. Without an image no stage of a tower or projector has run.
            cost: cost model of the model.
            rows: rows of the batch; a stage of a tower has images instead.
        """
        uses = cost.uses(trace)
        totals = {name: routing.counts() for name, routing in trace.routings.items()}
        ratio, fraction = (cost.ratio(uses, measure) for measure in ("macs_ratio", "mean_token_fraction"))
        stacks = {name: use for name, use in uses.items() if name in cost.by_stack}
        self.merge(KeepCount(totals, ratio * rows, fraction * rows, rows, stacks))

    def clear(self) -> None:
        """Resets all counts."""
        self.totals.clear()
        self.uses.clear()
        self.macs, self.fractions, self.rows = 0.0, 0.0, 0

    def merge(self, other: KeepCount) -> None:
        """Adds the counts of other forwards, for example of another rank."""
        for name, (kept, present) in other.totals.items():
            before = self.totals.get(name, (0, 0))
            self.totals[name] = (before[0] + kept, before[1] + present)
        for name, use in other.uses.items():
            self.uses[name] = self.uses.get(name, StackUse()) + use
        self.macs, self.fractions, self.rows = self.macs + other.macs, self.fractions + other.fractions, self.rows + other.rows

    @property
    def achieved(self) -> dict[str, float]:
        """Routable tokens leaving ÷ entering, by stage name; 1 where none entered, because nothing was dropped."""
        return {name: kept / present if present else 1.0 for name, (kept, present) in self.totals.items()}

    @property
    def macs_ratio(self) -> float:
        """Mean of ``macs_ratio`` over the rows; 1 if there are no rows, as for a dense model."""
        return self.macs / self.rows if self.rows else 1.0

    @property
    def mean_token_fraction(self) -> float:
        """Mean of ``mean_token_fraction`` over the rows, likewise."""
        return self.fractions / self.rows if self.rows else 1.0
