"""Phases of training that read rows of different kinds, as one data set and one order of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, Sampler

from ..loader import StepBatches


class PhasedRows(Dataset[dict[str, Any]]):
    """The training rows of every phase. An index is (phase, index in the rows of that phase).

    Args:
        parts: rows of each phase.
    """

    def __init__(self, parts: Sequence[Dataset[dict[str, Any]]]) -> None:
        self.parts = list(parts)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        phase, index = place
        return self.parts[phase][index]

    def __getitems__(self, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """The rows of a batch, which is of one phase; those of a stream come with the bad rows that were read on the way."""
        rows, indices = self.parts[places[0][0]], [index for _, index in places]
        together = getattr(rows, "__getitems__", None)
        return [rows[index] for index in indices] if together is None else list(together(indices))


class PhasedBatches(Sampler[list[tuple[int, int]]]):
    """The batches of a run of several phases: batch b is that of its phase's order at b, so that an ordinary phase reads the rows that a run
    without phases reads in the same steps.

    Args:
        parts: batches of each phase, in an order that spans the whole run.
        numbers: batches that belong to each phase.
    """

    def __init__(self, parts: Sequence[StepBatches], numbers: Sequence[int]) -> None:
        self.parts, self.ends = list(parts), list(itertools.accumulate(numbers))
        self.start = 0

    def __len__(self) -> int:
        return self.ends[-1]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        begin = 0
        for phase, (part, end) in enumerate(zip(self.parts, self.ends, strict=True)):
            part.start = max(begin, self.start)
            for batch in itertools.islice(part, max(0, end - part.start)):
                yield [(phase, index) for index in batch]
            begin = end

    # What the order of a run depends on, as of StepBatches.
    @property
    def length(self) -> list[int]:
        """Rows of each phase's data set."""
        return [part.length for part in self.parts]

    @property
    def batch_size(self) -> list[int]:
        """Rows of a batch of each phase."""
        return [part.batch_size for part in self.parts]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.parts[0].world_size

    @property
    def seed(self) -> int:
        """Seed of the permutations."""
        return self.parts[0].seed
