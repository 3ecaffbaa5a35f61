"""The interface of every kind of data: its splits, and the LightningDataModule over them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from .labels.classes import without
from .loader import DataPhase, EvalBatches, ResumableLoader, RunBatches, StepBatches, leave_to_parent
from .rows import BadRowCount, collate

# Rows of a split whose content is hashed.
SAMPLED = 32
# Longest wait for a batch from loader processes, in seconds.
LOADER_SECONDS = 600


@dataclass(frozen=True)
class Splits:
    """Splits, ready for loaders.

    Attributes:
        train, validation, test: data sets; ``test`` is ``validation`` if there is no test split.
        classes: names of the classes; empty without labels.
        has_test: whether ``test`` is a separate split.
        counts: what was counted of each class when the data were opened, by name of the split; empty if nothing was.
        unit: what was counted.
        notes: what else to know of the data before training, one line each.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: list[str] = field(default_factory=list)
    has_test: bool = True
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unit: str = "rows"
    notes: Sequence[str] = ()

    @property
    def remarks(self) -> list[str]:
        """What to know of the data before training: a line for each class without rows."""
        return [*self.notes, *without(self.classes, self.counts, self.unit)]

    @property
    def facts(self) -> dict[str, Any]:
        """What was counted of each class when the data were opened, and the remarks, for a report."""
        counts = {split: dict(zip(self.classes, numbers, strict=True)) for split, numbers in self.counts.items()}
        return {"unit": self.unit, "counts": counts, "remarks": self.remarks}

    @property
    def train_rows(self) -> int | None:
        """Items of an epoch; None for a stream."""
        return len(self.train)  # type: ignore[arg-type]

    def train_batches(self, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> StepBatches:
        """Indices of the items of each batch of a training run on one process."""
        return StepBatches(len(self.train), batch_size, batches, seed, rank, world_size)  # type: ignore[arg-type]

    def in_bags(self, bag: int) -> Splits:
        """These splits with training rows of bags of ``bag`` tokens, of as many bags as the rows have tokens; of text only."""
        raise NotImplementedError

    def train_phases(self, phases: Sequence[DataPhase], seed: int, rank: int = 0, world_size: int = 1) -> tuple[Dataset[Any], RunBatches]:
        """Training rows and their batches on one process, in a run whose phases read rows of different kinds; of text only.

        Args:
            phases: the phases, in their order.
            seed, rank, world_size: as in ``train_batches``.
        """
        raise NotImplementedError

    def train_batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A training batch of items of ``train``."""
        return collate(items)

    def bad_rows(self, allowed: float) -> BadRowCount:
        """The bad rows that were found when the data were opened, as the start of a run's count.

        Args:
            allowed: allowed share of bad rows.
        """
        return BadRowCount(allowed, len(self.train))  # type: ignore[arg-type]

    def save_beside(self, folder: Path) -> None:
        """Writes the files that the model's inputs need, such as a tokenizer, into the folder of its weights; images need none."""

    @cached_property
    def record(self) -> dict[str, Any]:
        """Facts that a resumed run must find again: names of the classes, and the rows of each split with a hash of SAMPLED of them.

        Token ids and labels are hashed, so a changed tokenizer or another order of the classes is found too; pixels are not. The training
        rows of a stream are left out, because more may be added to it.
        """
        rows: dict[str, Any] = {"train": self.train} if self.train_rows is not None else {}
        return {"classes": list(self.classes)} | {
            name: {"rows": len(split), "sha256": _digest(split)}
            for name, split in (rows | {"validation": self.validation, "test": self.test}).items()
        }


def _digest(rows: Any) -> str:
    """SHA-256 of the whole numbers in evenly spaced rows."""
    digest = hashlib.sha256()
    for index in sorted({position * len(rows) // SAMPLED for position in range(SAMPLED)} if len(rows) else ()):
        for key, value in sorted(rows[index].items()):
            if isinstance(value, list):
                # Pixels of images.
                digest.update(f"{key} {len(value)}".encode())
            elif not isinstance(value, torch.Tensor):
                digest.update(f"{key} {value}".encode())
            elif not value.is_floating_point():
                digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


class DataModule(lightning.LightningDataModule):
    """Loaders over splits.

    Args:
        data: the splits.
        batch_size: training items per step and process.
        eval_batch_size: validation and test items per step and process.
        batches: training batches of the whole run on one process.
        workers: loader processes.
        seed: seed of the training order.
        accumulate: training batches of an optimizer step.
        phases: phases whose rows differ, with as many batches together; empty if all batches are alike.
    """

    def __init__(
        self,
        data: Splits,
        batch_size: int,
        eval_batch_size: int,
        batches: int,
        workers: int,
        seed: int,
        accumulate: int = 1,
        phases: Sequence[DataPhase] = (),
    ) -> None:
        super().__init__()
        self.data = data
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.batches, self.workers, self.seed, self.accumulate = batches, workers, seed, accumulate
        self.phases = phases

    def train_dataloader(self) -> ResumableLoader:
        rows, batches = self._rows()
        return ResumableLoader(rows, batches, self.accumulate, collate_fn=self.data.train_batch, **self._options())

    def _rows(self) -> tuple[Dataset[Any], RunBatches]:
        if self.phases:
            return self.data.train_phases(self.phases, self.seed, *self._place())
        return self.data.train, self.data.train_batches(self.batch_size, self.batches, self.seed, *self._place())

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluated(self.data.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluated(self.data.test)

    def _evaluated(self, rows: Dataset[Any]) -> DataLoader[Any]:
        batches = EvalBatches(len(rows), self.eval_batch_size, *self._place())  # type: ignore[arg-type]
        return DataLoader(rows, batch_sampler=batches, collate_fn=collate, **self._options())

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            # A loader process that cannot write to shared memory sends nothing, not even its error.
            "timeout": LOADER_SECONDS if self.workers else 0,
            "persistent_workers": self.workers > 0,
            "worker_init_fn": leave_to_parent,
        }
