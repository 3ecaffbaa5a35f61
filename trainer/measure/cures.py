"""What to change where routers do not learn, or do not meet the ratio."""

from __future__ import annotations

from dataclasses import dataclass

from ...modules.budget.budget import DEFAULT, Budget
from ...modules.config import PartConfig
from ...modules.stage import Stage


@dataclass(frozen=True)
class Cures:
    """Advice that names only keys which the recipe accepts as it is.

    Attributes:
        budget: the budget of the run; None without one.
    """

    budget: Budget | None = None

    @property
    def shared(self) -> bool:
        """Several stages share one target of the model out among themselves."""
        return self.budget is not None and self.budget.config.measure != "keep" and len(self.budget.held) > 1

    def controller(self, word: str, *stages: Stage) -> list[str]:
        """How the ratio of stages is reached faster or more slowly, where the budget holds it.

        Args:
            word: ``larger`` or ``smaller``.
            stages: the stages; without any the whole model.
        """
        budget = self.budget
        if budget is None or budget.controller is None:
            return []
        held = {stage.config.key for stage in budget.held}
        if stages and not held & {stage.config.key for stage in stages}:
            return []
        if budget.controller.pace:
            pace, part = budget.controller.pace, PartConfig.of(budget.config.controller or DEFAULT, "controller")
            now = getattr(budget.controller, pace)
            return [f"give a {word} {pace} than in budget.controller={_with(part, pace, now)}"]
        if budget.regularizer is None:
            return []
        part = PartConfig.of(budget.config.regularizer, "regularizer")
        return [f"give a {word} weight than in budget.regularizer={_with(part, 'weight', budget.regularizer.weight)}"]

    def regularizer(self, stage: Stage, *names: str) -> list[str]:
        """One of these regularizers, where it is free to set: one that holds the ratio has to stay."""
        budget = self.budget
        if budget is None or not stage.scorer.probabilities:
            return []
        holds = budget.controller is not None and budget.controller.holds
        needed = budget.regularizer is not None and budget.regularizer.holds_ratio and not holds
        return [] if needed else [f"set budget.regularizer={' or '.join(names)}"]

    def noise(self, stage: Stage) -> list[str]:
        """Exploration, where the stage's decisions have it."""
        return [] if self.budget is None or stage.selector.ignores_noise else ["raise budget.noise"]


def _with(part: PartConfig, option: str, value: float) -> str:
    """A part as an override gives it, with its value of an option."""
    settings = {"name": part.name, **part.options, option: value}
    return "'{" + ", ".join(f"{key}: {each:g}" if isinstance(each, float) else f"{key}: {each}" for key, each in settings.items()) + "}'"


def any_of(cures: list[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(cures[:-1]), cures[-1]] if len(cures) > 1 else cures)
