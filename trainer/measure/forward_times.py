"""Paired times of forwards on batches of held-out data, and the size of an input whose forward takes a given time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ...data.rows import collate, good_rows, on_device
from ...data.splits import Splits
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..recipe.schema import Recipe
from ..tasks.base import Task
from .bench import Ratio, paired_ratio, paired_times
from .out_of_memory import out_of_memory

# Rounds of a comparison of two forwards, and of each step of a search.
ROUNDS, SEARCH_ROUNDS = 20, 8


@dataclass(frozen=True)
class Forward:
    """A model and the data that it reads.

    Attributes:
        model: dense or compressed, on its device.
        data: splits with inputs of its size.
        recipe: recipe of the data.
        task: its task.
    """

    model: PreTrainedModel
    data: Splits
    recipe: Recipe
    task: type[Task]

    def batch(self, rows: int) -> dict[str, Any]:
        """The first good test rows, over and over if there are fewer, on the model's device."""
        found = good_rows(self.data.test, rows)
        batch = collate([found[place % len(found)] for place in range(rows)])
        return on_device(batch, self.model.device)

    def run(self, rows: int) -> Callable[[], None]:
        """A function that runs the forward of a batch, in evaluation mode and without gradient."""
        model, batch = self.model.eval(), self.batch(rows)
        compressed = bool(stages_of(model))

        def run() -> None:
            trace = {"trace": Trace(seed=self.recipe.seed, sample_ids=batch["sample_ids"])} if compressed else {}
            with torch.no_grad():
                self.task.forward(model, batch, **trace)

        return run


def nearest(sizes: Sequence[int], ratio: Callable[[int], float]) -> int:
    """The size whose time is nearest to that of what it is compared with, by bisection.

    Args:
        sizes: candidates, growing; their times are taken to grow.
        ratio: time of a size ÷ time of what it is compared with; called about log₂ of the number of sizes times.
    """
    known: dict[int, float] = {}

    def of(place: int) -> float:
        if place not in known:
            known[place] = ratio(sizes[place])
        return known[place]

    low, high = 0, len(sizes) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) < 1 else (low, middle)
    return sizes[min((low, high), key=lambda place: abs(math.log(of(place))))]


def time_ratio(this: Forward, other: Forward, rows: int, rounds: int = SEARCH_ROUNDS) -> Ratio:
    """Time of a forward of ``rows`` rows ÷ that of another model, from pairs of the same round."""
    times = paired_times({"this": this.run(rows), "other": other.run(rows)}, this.model.device, rounds)
    return paired_ratio(times["this"], times["other"])


@dataclass(frozen=True)
class Speed:
    """A model's forward of one batch size.

    Attributes:
        seconds: median time.
        rows_per_second: rows of the batch ÷ it.
        per_second: images or tokens of the batch, by the task's unit, before any compression ÷ it.
        speedup: dense ÷ this.
    """

    seconds: float
    rows_per_second: float
    per_second: float
    speedup: Ratio


def throughput(forwards: Mapping[str, Forward], dense: str, rows: int, rounds: int = ROUNDS) -> dict[str, Speed] | None:
    """The speed of each forward on the same ``rows`` rows, from interleaved rounds; None if the memory is not enough.

    Args:
        forwards: by name.
        dense: name of the one that others are compared with, whose batch is counted.
        rows: rows of the batch.
        rounds: number of paired rounds.
    """
    base = forwards[dense]
    try:
        times = paired_times({name: forward.run(rows) for name, forward in forwards.items()}, base.model.device, rounds)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    amount = base.task.amount(base.batch(rows))
    found = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        found[name] = Speed(median, rows / median, amount / median, paired_ratio(times[dense], seconds))
    return found
