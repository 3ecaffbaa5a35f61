"""Phases of a training run, each with its share of the steps, of which the last is ordinary training."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from ...data.recipe import Block
from ...modules.config import CompressionConfig

ORDINARY, _KINDS = "ordinary", ("superposition", "patch_level", "keep")
# A bag of one token is ordinary training.
Bag = Annotated[int, Field(ge=2, le=2**53)]


class PhaseRecipe(Block):
    """A phase of training: bags of tokens, a keep of stages, or ordinary training."""

    share: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="share of the steps; null, in one phase, is the rest")
    superposition: Bag | None = Field(
        None,
        description="consecutive tokens that enter as one, the mean of their embeddings, and predict those of the next bag (2605.06546); a "
        "row has as many bags as data.sequence_length, so a step reads so many times more text at its usual cost",
    )
    patch_level: Bag | None = Field(
        None,
        description="the same (2407.12665), with so many times fewer rows in a step, so that it reads its usual text at a fraction of the cost",
    )
    keep: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="keep of the stages that have none of their own; 1 in phases without it, which are ordinary training"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> PhaseRecipe:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a phase has one of {' and '.join(given)}: make two phases of it, or remove one of them")
        return self

    @property
    def bag(self) -> int | None:
        """Tokens that enter as one; None if tokens enter one by one."""
        return self.patch_level if self.superposition is None else self.superposition

    @property
    def fewer_rows(self) -> int:
        """Factor by which a batch has fewer rows than ``data.batch_size``."""
        return self.patch_level or 1

    @property
    def ordinary(self) -> bool:
        """Ordinary training of the whole model."""
        return self.bag is None and self.keep in (None, 1)

    @property
    def kind(self) -> str:
        """The key that says what the phase does."""
        return next((kind for kind in _KINDS if getattr(self, kind) is not None), ORDINARY)

    @property
    def name(self) -> str:
        """What the phase does, in step lines and reports."""
        return self.kind if self.kind == ORDINARY else f"{self.kind} {getattr(self, self.kind):g}"

    def setting(self, number: int) -> str:
        """Key and value of what the phase does, for messages.

        Args:
            number: index among the recipe's phases.
        """
        return f"phases.{number}.{self.name.replace(' ', ' = ')}"


@dataclass(frozen=True)
class PhasePlan:
    """The phases of a run by its steps.

    Attributes:
        phases: the phases, in their order.
        ends: step after the last one of each phase; the last is the number of steps.
        stages: names of the stages whose keep is that of the phase.
    """

    phases: tuple[PhaseRecipe, ...]
    ends: tuple[int, ...]
    stages: tuple[str, ...] = ()

    @classmethod
    def of(cls, phases: Sequence[PhaseRecipe] | None, compression: CompressionConfig | None, total_steps: int) -> PhasePlan | None:
        """The plan of a run; None if its recipe has no phases.

        Args:
            phases: phases of a checked recipe.
            compression: its stages, with one layer each.
            total_steps: optimizer steps of the run.

        Raises:
            ValueError: a phase has no step.
        """
        if not phases:
            return None
        given = sum(phase.share for phase in phases if phase.share is not None)
        shares = [1 - given if phase.share is None else phase.share for phase in phases]
        ends = [math.floor(done * total_steps + 0.5) for done in itertools.accumulate(shares)]
        for number, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
            if begin == end:
                raise ValueError(
                    f"phases.{number} has no step: its share, {shares[number]:g}, of {total_steps} steps is less than one; raise the share, "
                    "or trainer.max_steps"
                )
        stages = [] if compression is None else [stage.key for stage in compression.stages if stage.free]
        return cls(tuple(phases), (*ends[:-1], total_steps), tuple(stages))

    @property
    def steps(self) -> list[int]:
        """Steps of each phase."""
        return [end - begin for begin, end in itertools.pairwise([0, *self.ends])]

    @property
    def described(self) -> str:
        """Steps and name of each phase, in one line."""
        return "phases: " + ", ".join(f"{steps:,} steps {phase.name}" for steps, phase in zip(self.steps, self.phases, strict=True))

    def number(self, step: int) -> int:
        """Index of the phase that a step belongs to; steps after the end belong to the last."""
        return min(bisect.bisect_right(self.ends, step), len(self.phases) - 1)

    def at(self, step: int) -> PhaseRecipe:
        """The phase that a step belongs to."""
        return self.phases[self.number(step)]

    def keep(self, phase: PhaseRecipe) -> dict[str, float]:
        """Keep of the stages in a phase, by stage name."""
        return dict.fromkeys(self.stages, 1.0 if phase.keep is None else phase.keep)

    def idle(self, phase: PhaseRecipe) -> tuple[str, ...]:
        """Names of the stages that do nothing in a phase: their routers do not run, and learn nothing."""
        return self.stages if phase.keep in (None, 1) else ()


def check_phases(recipe: Any) -> None:
    """Raises ValueError, with the cure, if the phases of a recipe do not go together with each other or with its other blocks.

    Args:
        recipe: a Recipe, whose schema calls this.
    """
    phases = recipe.phases
    if not phases:
        return
    _check_shares(phases)
    if not phases[-1].ordinary:
        raise ValueError(
            f"phases.{len(phases) - 1} is {phases[-1].name}, and the last phase is ordinary training, which leaves an ordinary model: add one "
            "with a share alone"
        )
    if all(phase.ordinary for phase in phases):
        raise ValueError(
            "phases has no effect, as all of them are ordinary training: set superposition, patch_level or keep, or remove phases"
        )
    for number, phase in enumerate(phases):
        if phase.bag is not None:
            _check_bags(recipe, phase, phase.setting(number))
        if phase.keep is not None:
            _check_keep(recipe, phase.setting(number))


def _check_shares(phases: Sequence[PhaseRecipe]) -> None:
    given, open_ones = sum(phase.share or 0.0 for phase in phases), sum(phase.share is None for phase in phases)
    if open_ones > 1:
        raise ValueError(f"{open_ones} phases have no share, and one may be without, which gets the rest: set the others")
    if open_ones == 0 and abs(given - 1) > 1e-6:
        raise ValueError(f"the shares of phases add up to {given:g}, not to 1: leave out that of one phase, which gets the rest")
    if open_ones and given >= 1 - 1e-6:
        raise ValueError(f"the shares of phases add up to {given:g}, and one phase without a share gets the rest: lower them")


def _check_bags(recipe: Any, phase: PhaseRecipe, key: str) -> None:
    data = recipe.data
    if not data.predicts_next:
        raise ValueError(
            f"{key} predicts the next tokens of a text, and task = {recipe.task} has {data.holds}: only task causal_lm has this phase; for "
            "other tasks give compression.stages and phases a keep"
        )
    if recipe.compression is not None:
        raise ValueError(
            f"{key} trains all layers on bags, and the stages of compression decide for tokens: train without compression, then start a run "
            "with it from these weights (model.name)"
        )
    if recipe.lora is not None and recipe.lora.freezes:
        raise ValueError(
            f"{key} teaches every weight to read bags and then single tokens again, and lora.mode = {recipe.lora.mode!r} freezes them: remove "
            "lora, or set lora.mode=full"
        )
    if recipe.trainer.max_steps is None:
        raise ValueError(
            f"{key} reads more text in a step or fewer rows, and trainer.max_epochs counts ordinary rows: set trainer.max_steps in its place"
        )
    if data.batch_size % phase.fewer_rows:
        raise ValueError(
            f"{key} makes one row of {phase.fewer_rows}, and data.batch_size = {data.batch_size} is no multiple of it: set data.batch_size to "
            "one, or take superposition, which reads more text"
        )


def _check_keep(recipe: Any, key: str) -> None:
    for block in ("budget", "training_keep"):
        if getattr(recipe, block) is not None:
            raise ValueError(f"{key} and {block} both set the keep of a training step: remove one of them")
    if recipe.compression is None or not any(stage.free for stage in recipe.compression.stages):
        raise ValueError(f"{key} is for stages without a keep of their own, and there are none: add one, or remove keep from one")
