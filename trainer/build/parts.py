"""The parts of a run."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ...data.loader import DataPhase
from ...data.splits import DataModule, Splits
from ...modules.budget.budget import Budget
from ...modules.checkpoints.base_weights import Base
from ...modules.cost.cost import CostModel
from ..recipe.phases import PhasePlan
from ..recipe.schema import Recipe


@dataclass(frozen=True)
class RunParts:
    """The parts of a run.

    Attributes:
        recipe: the recipe.
        data: splits of the data.
        model: the model, compressed if the recipe has stages.
        cost: cost model; None for a dense model of a family without an adapter.
        budget: budget; None for a dense model, or if every stage has its own keep.
        total_steps: optimizer steps.
        base: frozen weights, which the adapter names; None if everything trains.
        phases: phases of training by step; None if all steps are alike.
    """

    recipe: Recipe
    data: Splits
    model: PreTrainedModel
    cost: CostModel | None
    budget: Budget | None
    total_steps: int
    base: Base | None = None
    phases: PhasePlan | None = None

    def data_module(self) -> DataModule:
        """Loaders for this run."""
        data, trainer = self.recipe.data, self.recipe.trainer
        batches = self.total_steps * trainer.accumulate
        return DataModule(
            self.data, data.batch_size, data.eval_batch_size, batches, data.workers, self.recipe.seed, trainer.accumulate, self.data_phases
        )

    @property
    def data_phases(self) -> list[DataPhase]:
        """What each phase reads; empty if the rows of all phases are alike."""
        plan, size = self.phases, self.recipe.data.batch_size
        if plan is None or all(phase.bag is None for phase in plan.phases):
            return []
        return [
            DataPhase(steps * self.recipe.trainer.accumulate, size // phase.fewer_rows, phase.bag)
            for steps, phase in zip(plan.steps, plan.phases, strict=True)
        ]
