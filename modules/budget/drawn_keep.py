"""DrawnKeep: the keep of every stage in a training step, drawn anew for each step, so that one set of weights serves many ratios."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .schedules import SCHEDULES, linear, progress

DRAWS = ("linear", "reciprocal")


@dataclass(frozen=True)
class DrawnKeep:
    """The keep of every stage in a training step: one of some values, or any value between two.

    The draw is a function of seed and step: the same on every rank, in every batch of an accumulated step, and after resuming.

    Attributes:
        choices: values that are equally likely (M3, arXiv 2405.17430, draws scales); empty for a draw between two values.
        lowest: lower end of a draw between two values.
        highest: its upper end.
        draw: how such a draw is spread, like the budget's schedules of these names: ``linear`` is even in the keep, ``reciprocal`` even in
            the compression factor 1 ÷ keep, so that more steps keep few tokens.
        start: lower end at step 0, from which it moves to ``lowest`` on a straight line; None has ``lowest`` from the first step.
        until: fraction of training at which ``lowest`` is reached.
        full: probability of a step with all tokens, whatever else is drawn.
        also: keeps at which every batch is trained besides the drawn one, with the mean of the losses: the sandwich rule, which has the ends
            of the range (arXiv 1903.05134). Each costs another forward and backward.
    """

    choices: tuple[float, ...] = ()
    lowest: float | None = None
    highest: float = 1.0
    draw: str = "linear"
    start: float | None = None
    until: float = 1.0
    full: float = 0.0
    also: tuple[float, ...] = ()

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 - read by pydantic where a recipe holds one

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "also", tuple(self.also))
        if bool(self.choices) == (self.lowest is not None):
            raise ValueError("training_keep: give either choices, a list of keeps, or lowest, the smallest keep of a draw between two")
        keeps: dict[str, float | None] = {"lowest": self.lowest, "highest": self.highest, "start": self.start}
        for name, values in (("choices", self.choices), ("also", self.also)):
            keeps |= {f"{name}[{i}]": value for i, value in enumerate(values)}
        for name, value in keeps.items():
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"training_keep.{name} = {value} must be in (0, 1]: the fraction that is kept, not removed")
        if self.draw not in DRAWS:
            raise ValueError(f"training_keep.draw = {self.draw!r} is unknown: {' or '.join(DRAWS)}, even in the keep or in 1 ÷ keep")
        if self.choices and (self.highest != 1 or self.draw != "linear" or self.start is not None or self.until != 1):
            raise ValueError(
                "training_keep: highest, draw, start and until are of a draw between two values: remove them, or give lowest in place of choices"
            )
        for name in ("lowest", "start"):
            value = getattr(self, name)
            if value is not None and value > self.highest:
                raise ValueError(f"training_keep.{name} = {value} must be at most highest, {self.highest}")
        if self.until != 1 and self.start is None:
            raise ValueError(f"training_keep.until = {self.until} is where the way from start ends, and start is not set: set it")
        for name in ("until", "full"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training_keep.{name} = {getattr(self, name)} must be in [0, 1]")

    @property
    def least(self) -> float:
        """The lowest keep that a step can have."""
        drawn = self.choices or tuple(end for end in (self.lowest, self.start) if end is not None)
        return min(drawn + self.also)

    def bounds(self, step: int, total_steps: int) -> tuple[float, float]:
        """Lower and upper end of the draw at a step."""
        assert self.lowest is not None
        start = self.lowest if self.start is None else self.start
        return linear(start, self.lowest, progress(step, self.until, total_steps)), self.highest

    def keeps(self, step: int, total_steps: int, seed: int) -> tuple[float, ...]:
        """The keeps at which the batches of a step are trained: the drawn one, then others of ``also``."""
        return tuple(dict.fromkeys([self.keep(step, total_steps, seed), *self.also]))

    def keep(self, step: int, total_steps: int, seed: int) -> float:
        """The drawn keep of every stage at a step of training.

        Args:
            step: optimizer step.
            total_steps: number of optimizer steps.
            seed: seed of the run.
        """
        draws = random.Random(f"{seed} {step}")
        if draws.random() < self.full:
            return 1.0
        if self.choices:
            return draws.choice(self.choices)
        lowest, highest = self.bounds(step, total_steps)
        return SCHEDULES[self.draw](lowest, highest, draws.random())
