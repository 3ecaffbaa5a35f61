"""BudgetConfig: the requested cost of a model. Plain data; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import registry
from ..config import PartConfig
from .schedules import SCHEDULES

MEASURES = ("macs_ratio", "keep", "mean_token_fraction", "step_time")


@dataclass(frozen=True)
class BudgetConfig:
    """The requested cost of a model.

    Attributes:
        target: requested value of the measure, in (0, 1].
        measure: ``macs_ratio`` (MACs of the compressed forward ÷ dense) or ``mean_token_fraction`` (tokens that layers process ÷ dense),
            for which the budget computes the keeps; ``keep`` (of every stage without its own); or ``step_time`` (time of a training step
            ÷ dense), which ``laconic train`` turns into a ``macs_ratio`` on the device that it runs on.
        shares: in a model of several stacks, how the reduction is shared out, by stack: the stages of a stack have the keep that the
            target gives to this power, 1 by default. At 2 a stack gives up about twice as much as another one, at 0 nothing.
        regularizer: pulls the soft ratio of trained scorers to the target; None for selectors that hold the count by themselves.
        controller: brings the achieved measure to the requested one, where selectors leave the count to the budget. None takes
            ``augmented_lagrangian`` there; ``fixed`` is the regularizer alone.
        ramp_until: fraction of training over which the regularizer's weight grows from 0.
        schedule: course of the target from ``start`` to ``target``: ``constant``, ``linear``, ``cosine``, ``reciprocal`` (even in the
            compression factor) or ``step`` (all at once). A ``start`` below ``target`` is a reverse curriculum; with ``target`` 1 the rest
            of training is at full length, and leaves an ordinary model.
        start: target at step 0 of a schedule that moves.
        schedule_from: fraction of training until which the target stays at ``start``.
        schedule_until: fraction of training at which ``target`` is reached.
        increment: step size of the target in a linear, cosine or reciprocal schedule, as in random-LTD; 0 changes it at every training step.
        noise: strength of the exploration noise at step 0: in standard deviations of the scores with ``top_k`` and ``predictor``, in
            log-odds with ``gumbel`` and a fixed ``threshold``. Another ``threshold`` has none.
        noise_until: fraction of training at which the noise reaches 0.
    """

    target: float = 0.5
    measure: str = "macs_ratio"
    shares: Mapping[str, float] = field(default_factory=dict)
    regularizer: PartConfig | str | Mapping[str, Any] | None = None
    controller: PartConfig | str | Mapping[str, Any] | None = None
    ramp_until: float = 0.1
    schedule: str = "constant"
    start: float = 1.0
    schedule_from: float = 0.0
    schedule_until: float = 0.3
    increment: float = 0.0
    noise: float = 0.0
    noise_until: float = 0.6

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 - read by pydantic where a recipe holds a budget

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"budget.measure = {self.measure!r} must be one of {', '.join(MEASURES)}")
        for name in ("target", "start"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"budget.{name} = {getattr(self, name)} must be in (0, 1]: the fraction that is left, not removed")
        for stack, share in self.shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
                raise ValueError(f"budget.shares.{stack} = {share!r} must be a number of at least 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"budget.schedule = {self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if not 0 <= self.increment < 1:
            raise ValueError(f"budget.increment = {self.increment} must be in [0, 1): a part of the target, 16 of 512 tokens are 0.03125")
        if self.increment and self.measure == "step_time":
            raise ValueError(
                f"budget.increment = {self.increment} is a part of the tokens, and budget.measure = 'step_time' counts seconds: leave it out"
            )
        if self.increment and self.schedule in ("constant", "step"):
            raise ValueError(
                f"budget.increment = {self.increment} is for a target that moves by degrees: give budget.schedule = linear, cosine or reciprocal"
            )
        for name in ("ramp_until", "schedule_from", "schedule_until", "noise_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"budget.{name} = {getattr(self, name)} must be in [0, 1]: a fraction of training")
        if self.schedule_from > self.schedule_until:
            raise ValueError(
                f"budget.schedule_from = {self.schedule_from} must be at most budget.schedule_until, {self.schedule_until}, where the target "
                "is reached"
            )
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"budget.noise = {self.noise} must be a number of at least 0")
        if self.controller is not None:
            part = PartConfig.of(self.controller, "controller")
            object.__setattr__(self, "controller", part)
            if part.given is None:
                registry.check_name("controller", part.name, registry.part_names("controller"))
        if self.regularizer is not None:
            part = PartConfig.of(self.regularizer, "regularizer")
            object.__setattr__(self, "regularizer", part)
            if part.given is None:
                registry.check_name("regularizer", part.name, registry.part_names("regularizer"))
            weight = part.options.get("weight", 0.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"budget.regularizer: weight = {weight!r} must be a number of at least 0")
