"""A training loader that resumes at the batch where a checkpoint was saved, and the batches of training and evaluation."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# The order of a run's rows depends on these.
_ORDER = ("length", "batch_size", "world_size", "seed")


class StepBatches(Sampler[list[int]]):
    """Batches of a whole run as a function of (seed, step): every epoch has its own permutation.

    Args:
        length: rows of the data set.
        batch_size: rows of a batch on one process.
        batches: batches of the run on one process.
        seed: seed of the permutations.
        rank: rank of this process.
        world_size: number of processes; together they see every row once an epoch.

    An index is ``epoch * length + row``, so that augmentation differs between epochs.
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
        """Batches of an epoch on one process; rows that do not fill a last batch are dropped in this epoch."""
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
        """(length,) permutation of the rows of an epoch."""
        return torch.randperm(self.length, generator=draws)


class BucketedBatches(StepBatches):
    """Batches of items of similar length, which need little padding, in another order each epoch.

    Each group of ``POOL`` batches of the permutation is sorted by length, cut into batches, and the batches are shuffled. The ranks of
    one step get neighbouring lengths.

    Args:
        lengths: (rows,) int64 length of each item of the data set.
        batch_size, batches, seed, rank, world_size: as in StepBatches.
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
    """Batches of an endless stream in its order; an index counts items from the beginning of the stream.

    Args:
        batch_size, batches, rank, world_size: as in StepBatches.
        ahead: by how many items the stream is ahead of batches of this size, after other ones.
    """

    def __init__(self, batch_size: int, batches: int, rank: int = 0, world_size: int = 1, ahead: int = 0) -> None:
        self.length, self.batch_size, self.batches, self.seed = 0, batch_size, batches, 0
        self.rank, self.world_size, self.ahead = rank, world_size, ahead
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.batches):
            first = (step * self.world_size + self.rank) * self.batch_size + self.ahead
            yield list(range(first, first + self.batch_size))


@dataclass(frozen=True)
class DataPhase:
    """The training batches of one phase on one process.

    Attributes:
        batches: number of them.
        batch_size: rows of each.
        bag: consecutive tokens that a model reads as one; None for ordinary rows.
    """

    batches: int
    batch_size: int
    bag: int | None = None


class EvalBatches(Sampler[list[int]]):
    """Every row of a data set once over all processes, with equally many batches on each process: with sharded weights every rank must
    call the same modules, so no rank may run out of batches first.

    Args:
        length: rows of the data set.
        batch_size: rows of a batch on one process.
        rank: rank of this process.
        world_size: number of processes.

    A rank without a row for the last batch gets row 0 as padding, alone in its batch; batches from number ``counted`` on are padding.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    @property
    def counted(self) -> int:
        """Batches of this rank before the padding batches."""
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return whole + (self.rank < rest)

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        together = self.batch_size * self.world_size
        for first in range(0, self.length, together):
            yield list(range(first + self.rank, min(first + together, self.length), self.world_size)) or [0]


class RunBatches(Protocol):
    """Batches of a whole training run: the next is number ``start``, and the order depends on what ``_ORDER`` names."""

    start: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...


class ResumableLoader(DataLoader[Any]):
    """DataLoader over StepBatches whose state is the number of batches taken: resuming repeats and skips none.

    Every batch gets ``step_terms``, the sum of ``terms`` over the batches of its optimizer step on this process, and ``step_batches``, the
    number of these batches. They are therefore read before the first of them is used.

    Args:
        dataset: rows.
        batches: indices of the rows of each batch.
        accumulate: batches of an optimizer step.
        options: arguments of DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], batches: RunBatches, accumulate: int = 1, **options: Any) -> None:
        # A separate generator: creating an iterator draws a seed, which must not advance the default generator of dropout.
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self._batches = batches
        self._accumulate = accumulate
        self._taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._taken = self._batches.start
        found = super().__iter__()
        # Checkpoints are written after whole steps, so a resumed run starts with the first batch of one.
        while step := list(itertools.islice(found, self._accumulate)):
            of_step = {"step_terms": sum(batch["terms"] for batch in step), "step_batches": len(step)}
            for batch in step:
                self._taken += 1
                yield batch | of_step

    def state_dict(self) -> dict[str, Any]:
        """Number of batches taken, and the settings that the order depends on."""
        return {"taken": self._taken} | {name: getattr(self._batches, name) for name in _ORDER}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batches taken. Raises ValueError if the order would differ."""
        for name in _ORDER:
            now = getattr(self._batches, name)
            if state[name] != now:
                raise ValueError(f"cannot resume: the checkpoint was trained with {name} = {state[name]}, now it is {now}")
        self._batches.start = state["taken"]


def leave_to_parent(worker: int) -> None:
    """Start of a loader process: a signal to the whole group of processes is handled by the one that trains. A second SIGTERM, with which
    torch ends a worker that does not end by itself, is obeyed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)


def _once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
