"""StackUse: what forwards did in one stack, and the ratios that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class StackUse:
    """What a forward did in one stack, as sums over rows, to be added up over forwards.

    Attributes:
        processed: routable tokens, mean over the stack's layers.
        present: those of the dense model.
        macs: MACs of the compressed model.
        dense_macs: MACs of the dense model.
        tokens: tokens processed with the protected ones, mean over the stack's layers.
        dense_tokens: those of the dense model.
    """

    processed: float = 0.0
    present: float = 0.0
    macs: float = 0.0
    dense_macs: float = 0.0
    tokens: float = 0.0
    dense_tokens: float = 0.0

    def __add__(self, other: StackUse) -> StackUse:
        return StackUse(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def keep(self) -> float:
        """Routable tokens processed ÷ those of the dense model; 1 without any."""
        return self.processed / self.present if self.present else 1.0

    @property
    def macs_ratio(self) -> float:
        """MACs ÷ dense MACs; 1 if the stack did not run."""
        return self.macs / self.dense_macs if self.dense_macs else 1.0


def ratio_of(uses: Mapping[str, StackUse], measure: str, layers: Mapping[str, int]) -> float:
    """``macs_ratio`` or ``mean_token_fraction`` of what stacks did; 1 if none ran.

    Args:
        uses: sums over rows, by stack name.
        measure: which of the two.
        layers: number of layers of each stack with stages, by which it counts in ``mean_token_fraction``.
    """
    if measure == "macs_ratio":
        dense = sum(use.dense_macs for use in uses.values())
        return sum(use.macs for use in uses.values()) / dense if dense else 1.0
    # As in Cost.mean_token_fraction; one that did not run counts by no layer.
    ran = {name: number for name, number in layers.items() if name in uses and uses[name].dense_tokens}
    fractions = sum(number * uses[name].tokens / uses[name].dense_tokens for name, number in ran.items())
    return fractions / sum(ran.values()) if ran else 1.0
