"""The parts of a run."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ...data.splits import DataModule, Splits
from ...modules.budget.budget import Budget
from ...modules.checkpoints.base_weights import Base
from ...modules.cost.cost import CostModel
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
    """

    recipe: Recipe
    data: Splits
    model: PreTrainedModel
    cost: CostModel | None
    budget: Budget | None
    total_steps: int
    base: Base | None = None

    def data_module(self) -> DataModule:
        """Loaders for this run."""
        data, trainer = self.recipe.data, self.recipe.trainer
        batches = self.total_steps * trainer.accumulate
        return DataModule(self.data, data.batch_size, data.eval_batch_size, batches, data.workers, self.recipe.seed, trainer.accumulate)
