"""A training loader that goes on where a checkpoint left it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# What the order of a run's rows depends on.
_ORDER = ("length", "batch_size", "world_size", "seed")


class StepBatches(Sampler[list[int]]):
    """Batches of a whole run, a function of (seed, step): every epoch is a permutation of its own.

    Args:
        length: rows of the data set.
        batch_size: rows of a batch on one process.
        batches: batches of the run on one process.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes; together they see every row once an epoch.

    An index is ``epoch * length + row``, so that augmentation draws anew each epoch.
    """

    def __init__(self, length: int, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if length < batch_size * world_size:
            raise ValueError(
                f"{length} training rows are fewer than a batch of {batch_size} on {world_size} process(es): lower data.batch_size"
            )
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.rank, self.world_size = rank, world_size
        self.start = 0

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch on one process; a rest that fills no batch is left to the next permutation."""
        return self.length // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        order, drawn = torch.empty(0, dtype=torch.long), -1
        for step in range(self.start, self.batches):
            epoch, batch = divmod(step, self.per_epoch)
            if epoch != drawn:
                order, drawn = self._order(torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)), epoch
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield (order[first : first + self.batch_size] + epoch * self.length).tolist()

    def _order(self, draws: torch.Generator) -> torch.Tensor:
        """(length,) rows of an epoch in their order."""
        return torch.randperm(self.length, generator=draws)


class BucketedBatches(StepBatches):
    """Batches of items of similar length, so that little is padded, and still another order each epoch.

    Of every ``POOL`` batches of the permutation the items are sorted by length before they are cut into batches, and the batches then
    come in any order. Ranks get neighbours.

    Args:
        lengths: (rows,) int64 of the items of the data set.
        batch_size, batches, seed, rank, world_size: as of StepBatches.
    """

    POOL = 32

    def __init__(self, lengths: torch.Tensor, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(len(lengths), batch_size, batches, seed, rank, world_size)
        self.lengths = lengths

    def _order(self, draws: torch.Generator) -> torch.Tensor:
        order, together = super()._order(draws), self.batch_size * self.world_size
        used = self.per_epoch * together
        parts = []
        for pool in order[:used].split(self.POOL * together):
            alike = pool[self.lengths[pool].argsort(stable=True)].view(-1, together)
            parts.append(alike[torch.randperm(len(alike), generator=draws)].flatten())
        return torch.cat([*parts, order[used:]])


class StreamBatches(StepBatches):
    """Batches of a stream, in its order and without an end; an index counts the stream's items from its beginning.

    Arguments as of StepBatches, but for ``length`` and ``seed``, which a stream does not have.
    """

    def __init__(self, batch_size: int, batches: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.batches, self.seed = 0, batch_size, batches, 0
        self.rank, self.world_size = rank, world_size
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.batches):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class EvalBatches(Sampler[list[int]]):
    """Every row of a data set once, over all processes, in as many batches on each: where every rank must call the same modules,
    none may run out of batches before the others.

    Args:
        length: rows of the data set.
        batch_size: rows of a batch on one process.
        rank: of this process.
        world_size: number of processes.

    A rank that has no row of the last batches gets row 0 instead, alone in its batch; batches from ``counted`` on are such fillers.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    @property
    def counted(self) -> int:
        """Batches of this rank that are no fillers; they come first."""
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return whole + (self.rank < rest)

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        together = self.batch_size * self.world_size
        for first in range(0, self.length, together):
            yield list(range(first + self.rank, min(first + together, self.length), self.world_size)) or [0]


class ResumableLoader(DataLoader[Any]):
    """DataLoader over StepBatches whose state is how many batches were taken, so that resuming repeats and skips none."""

    def __init__(self, dataset: Dataset[Any], batches: StepBatches, **options: Any) -> None:
        # A generator of its own: starting to read must not move the one that dropout draws from.
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self._batches = batches
        self._taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._taken = self._batches.start
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches taken so far, and what the order depends on."""
        return {"taken": self._taken} | {name: getattr(self._batches, name) for name in _ORDER}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after the batches taken. Raises ValueError when the order would be another one."""
        for name in _ORDER:
            now = getattr(self._batches, name)
            if state[name] != now:
                raise ValueError(f"cannot resume: the checkpoint was trained with {name} = {state[name]}, now it is {now}")
        self._batches.start = state["taken"]
