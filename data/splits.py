"""What every kind of data is to a run: splits, and the LightningDataModule over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader, Dataset

from .loader import EvalBatches, ResumableLoader, StepBatches
from .rows import BadRowCount, collate


@dataclass(frozen=True)
class Splits:
    """Splits ready for loaders.

    Attributes:
        train, validation, test: data sets; ``test`` is ``validation`` where there is no other.
        classes: names of the labels; none where there are no labels.
        has_test: whether ``test`` is a split of its own.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: list[str] = field(default_factory=list)
    has_test: bool = True

    @property
    def train_rows(self) -> int | None:
        """Items of an epoch; None where nobody knows."""
        return len(self.train)  # type: ignore[arg-type]

    def train_batches(self, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> StepBatches:
        """Which items the batches of a training run hold on one process."""
        return StepBatches(len(self.train), batch_size, batches, seed, rank, world_size)  # type: ignore[arg-type]

    def bad_rows(self, allowed: float) -> BadRowCount:
        """What a run starts counting bad rows with: those that opening the data has found already.

        Args:
            allowed: fraction of the rows that may be bad.
        """
        return BadRowCount(allowed, len(self.train))  # type: ignore[arg-type]

    def save_beside(self, folder: Path) -> None:
        """Writes what a model needs to be used without these data, into the folder of its weights: nothing for images."""


class DataModule(lightning.LightningDataModule):
    """Loaders over splits.

    Args:
        data: the splits.
        batch_size: training items a step and process.
        eval_batch_size: likewise of validation and test.
        batches: training batches of the whole run on one process.
        workers: loader processes.
        seed: of the order.
    """

    def __init__(self, data: Splits, batch_size: int, eval_batch_size: int, batches: int, workers: int, seed: int) -> None:
        super().__init__()
        self.data = data
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.batches, self.workers, self.seed = batches, workers, seed

    def train_dataloader(self) -> ResumableLoader:
        batches = self.data.train_batches(self.batch_size, self.batches, self.seed, *self._place())
        return ResumableLoader(self.data.train, batches, **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluated(self.data.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluated(self.data.test)

    def _evaluated(self, rows: Dataset[Any]) -> DataLoader[Any]:
        batches = EvalBatches(len(rows), self.eval_batch_size, *self._place())  # type: ignore[arg-type]
        return DataLoader(rows, batch_sampler=batches, **self._options())

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _options(self) -> dict[str, Any]:
        return {"collate_fn": collate, "num_workers": self.workers, "persistent_workers": self.workers > 0}
