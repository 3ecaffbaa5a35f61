"""FollowingStage: a bypass stage that takes over the decision of an earlier one, so that neighbouring layers process the same tokens."""

from __future__ import annotations

from dataclasses import replace

from ..config import StageConfig
from ..estimators.base import Choice, Estimate, Estimator
from ..registry import part_class
from ..scorers.base import Scored, Scorer
from ..selectors.base import Selector
from ..site import SiteInput, TokenSpec
from ..stage import Stage
from ..tokens.state import TokenState
from .left_out import NoScores, NoTokens


class LeadersScores(NoScores):
    """In place of a scorer whose scores are those of another stage: what they are, and nothing that is computed.

    Args:
        spec: the tokens.
        of: class of that stage's scorer.
    """

    def __init__(self, spec: TokenSpec, of: type[Scorer]) -> None:
        super().__init__(spec)
        self.of = of

    @property
    def estimator(self) -> str | None:  # type: ignore[override]
        return self.of.estimator

    @property
    def probabilities(self) -> bool:  # type: ignore[override]
        return self.of.probabilities

    @property
    def answers_task(self) -> bool:  # type: ignore[override]
        return self.of.answers_task

    @property
    def count(self) -> str:  # type: ignore[override]
        return self.of.count


class LeadersChoice(NoTokens):
    """In place of a selector whose decision is that of another stage.

    Args:
        spec: the tokens.
        of: class of that stage's selector.
    """

    def __init__(self, spec: TokenSpec, of: type[Selector]) -> None:
        super().__init__(spec)
        self.of = of

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.of.adaptive


class FollowingStage(Stage):
    """Its router costs nothing; its estimator gives the leader's scorer a gradient from this layer too."""

    def _build_router(self, spec: TokenSpec) -> tuple[Scorer, Selector]:
        return (
            LeadersScores(spec, part_class("scorer", self.config.part("scorer"))),
            LeadersChoice(spec, part_class("selector", self.config.part("selector"))),
        )

    def _build_estimator(self) -> Estimator | None:
        estimator = super()._build_estimator()
        # Answers of tokens are trained where they are given.
        return None if estimator is not None and estimator.needs_answers else estimator

    def _choose(self, site: SiteInput, state: TokenState) -> Choice:
        led = site.trace.routings[str(self.reads)]
        decision = site.trace.replay.get(self.config.key, led.decision)
        scored, estimate = Scored(led.scores), Estimate()
        untouched = decision.empty and (self.estimator is None or not self.estimator.of_bypassed)
        skipped = untouched and self._may_skip(site.layer, site.flow)
        learns = self.training and self.config.key not in site.trace.idle
        if self.estimator is not None and (learns or self.estimator.in_evaluation) and not skipped:
            estimate = self.estimator(replace(site, state=state), scored, decision)
        return Choice(scored, decision, estimate, led.requested, led.lookahead, None, skipped, led.routed)


def stage_class(config: StageConfig) -> type[Stage]:
    """The class of a config's stage."""
    return Stage if config.follows is None else FollowingStage
