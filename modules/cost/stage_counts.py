"""How many tokens leave a stage, or are processed at a bypass site: the one rule of training, evaluation and cost."""

from __future__ import annotations

from torch import Tensor

from ..config import StageConfig
from ..mergers.base import Merger
from ..scorers.base import Scorer
from ..selectors.base import Selector
from .count_rules import COUNT_RULES, StageCount, at_least_half, at_most, share_of


class CountsTokens:
    """Mixin of Stage.

    Attributes:
        config: configuration of the stage.
        scorer: its scorer, which may have a count rule of its own.
        selector: its selector.
        merger: its merger, which may have a largest number of outputs.
        unit: tokens that stay or leave together.
        place: index among the stack's stages.
        places: number of the stack's stages.
    """

    config: StageConfig
    scorer: Scorer
    selector: Selector
    merger: Merger
    unit: int
    place: int
    places: int

    def count(self, present: int | Tensor, original: int | Tensor, keep: float | None = None) -> int | Tensor:
        """Routable tokens that leave the stage (a bypass: that are processed), including the token that a merger adds.

        Args:
            present: routable tokens at the site.
            original: routable tokens before the first stage.
            keep: replaces the stage's own ``keep`` or ``tokens``; None uses these.
        """
        return self.unit * self._count(present // self.unit, original // self.unit, keep)

    def _count(self, present: int | Tensor, original: int | Tensor, keep: float | None = None) -> int | Tensor:
        """``count`` in units."""
        requested = self.config.keep if keep is None else keep
        # No token or every token, by any rule.
        if requested in (0, 1):
            return present * int(requested)
        if keep is None and self.config.tokens is not None:
            count = at_most(present, max(1, self.config.tokens // self.unit))
        else:
            assert requested is not None
            place = StageCount(original, self.place, self.places, 0 if self.config.bypass else 1)
            count = COUNT_RULES[self.rule](present, requested, place)
        if self.merger.most is not None:
            count = at_most(count, self.merger.most // self.unit)
        return at_least_half(present, count) if self.scorer.matches else count

    @property
    def rule(self) -> str:
        """Name of the count rule."""
        return self.config.count or self.scorer.count

    def share(self, keep: float) -> float:
        """Keep that the count rule asks of this stage where all stages of its stack have the given one."""
        return keep if keep in (0, 1) else share_of(self.rule, keep, self.place, self.places, self.config.bypass)

    def expected(self, present: float, original: float, keep: float | None = None) -> float:
        """``count`` for the cost model. If rows keep different numbers, the mean, which may be fractional."""
        if self.selector.adaptive:
            requested = self.config.keep if keep is None else keep
            assert requested is not None
            # A row of a model that is not causal keeps at least its best token.
            return present * requested if self.selector.causal else max(present * requested, min(1.0, present))
        count = self.count(round(present), round(original), keep)
        assert isinstance(count, int)
        return count
