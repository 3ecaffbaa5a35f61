"""Training steps at several lengths of the input: time and memory, and the powers of the length that they grow with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ...data.splits import Splits
from ..build.build import build, model_config, open_data
from ..build.initial_weights import start_of
from ..build.memory import memory_here
from ..build.parts import RunParts
from ..compare.statistics import t_quantile
from ..errors import RecipeError
from ..recipe.files import LoadedRecipe, changed
from ..recipe.schema import Recipe
from ..tasks.base import task_named
from .arms import bench_models
from .bench import Bench
from .out_of_memory import out_of_memory

# What is measured at each length.
ARMS = ("dense", "compressed", "oracle")


@dataclass(frozen=True)
class Exponent:
    """Least-squares fit of log(value) over log(tokens).

    Attributes:
        value: slope: value is proportional to tokens to this power, over the measured range.
        interval: half of the width of its 95 % interval by Student's t; None of two points.
    """

    value: float
    interval: float | None

    @staticmethod
    def of(tokens: Sequence[float], values: Sequence[float]) -> Exponent | None:
        """The fit; None of less than two points."""
        if len(tokens) < 2:
            return None
        x, y = np.log(tokens), np.log(values)
        x = x - x.mean()
        slope = float((x * y).sum() / (x * x).sum())
        if len(tokens) == 2:
            return Exponent(slope, None)
        free = len(tokens) - 2
        rest = y - y.mean() - slope * x
        return Exponent(slope, t_quantile(free) * float(np.sqrt((rest * rest).sum() / free / (x * x).sum())))


@dataclass(frozen=True)
class Point:
    """One length.

    Attributes:
        length: tokens of a row of text, or the side of an image in pixels.
        tokens: tokens of a row in the dense model's layers.
        bench: the paired measurement; None if the memory is not enough.
        reason: why it was not measured; empty if it was.
    """

    length: int
    tokens: int
    bench: Bench | None
    reason: str = ""

    def seconds(self, arm: str) -> float:
        """Median time of a step of one of ARMS."""
        assert self.bench is not None
        times = self.bench.arms["compressed"]
        return {"dense": self.bench.dense_seconds, "compressed": times.seconds, "oracle": times.oracle_seconds}[arm]

    def memory(self, arm: str) -> int:
        """Bytes of a step of one of ARMS."""
        assert self.bench is not None
        return self.bench.memory["compressed/oracle" if arm == "oracle" else arm]


@dataclass(frozen=True)
class Lengths:
    """Result of a measurement.

    Attributes:
        name: name of the recipe.
        unit: what a length is: ``tokens`` or ``pixels``.
        rows: rows of a step.
        points: by growing length.
    """

    name: str
    unit: str
    rows: int
    points: Sequence[Point]

    @property
    def measured(self) -> list[Point]:
        """The lengths for which the memory was enough."""
        return [point for point in self.points if point.bench is not None]

    def exponent(self, arm: str, what: str) -> Exponent | None:
        """The power of the number of tokens that ``seconds`` or ``memory`` of an arm grows with."""
        points = self.measured
        return Exponent.of([point.tokens for point in points], [getattr(point, what)(arm) for point in points])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        exponents = {arm: {what: self.exponent(arm, what) for what in ("seconds", "memory")} for arm in ARMS}
        return {
            "recipe": self.name,
            "unit": self.unit,
            "rows": self.rows,
            "points": [
                {
                    "length": point.length,
                    "tokens": point.tokens,
                    "reason": point.reason,
                    **(
                        {}
                        if point.bench is None
                        else {what: {arm: getattr(point, what)(arm) for arm in ARMS} for what in ("seconds", "memory")}
                    ),
                    "bench": None if point.bench is None else point.bench.to_dict(),
                }
                for point in self.points
            ],
            "exponents": {
                arm: {what: None if found is None else asdict(found) for what, found in fits.items()} for arm, fits in exponents.items()
            },
        }


def at_lengths(loaded: LoadedRecipe, lengths: Sequence[int]) -> Mapping[int, Recipe]:
    """The recipe at each length.

    Raises:
        RecipeError: the task or the model has no such length.
    """
    recipe, task = loaded.recipe, task_named(loaded.recipe.task)
    config = model_config(recipe.model, task, start_of(recipe.model))
    found = {}
    for length in lengths:
        try:
            found[length] = changed(recipe, task.at_length(recipe, config, length), f"--lengths {length}")
        except ValueError as error:
            raise RecipeError(str(error) if str(error).startswith("--lengths") else f"--lengths {length}: {error}") from None
    return found


def bench_lengths(loaded: LoadedRecipe, recipes: Mapping[int, Recipe], console: Console) -> Lengths:
    """Measures training steps on rows of noise at each length, shortest first, with as many rows at each.

    A length that does not fit into the memory ends the measurement: it and longer ones have the reason in place of figures.

    Args:
        loaded: the recipe, whose data give classes and vocabulary.
        recipes: the recipe at each length.
        console: console for progress.
    """
    task = task_named(loaded.recipe.task)
    start = start_of(loaded.recipe.model)
    data = open_data(loaded.recipe, model_config(loaded.recipe.model, task, start), start)
    points: list[Point] = []
    for length, recipe in sorted(recipes.items()):
        console.print(f"length {length:,}", highlight=False)
        point = _point(length, recipe, data, console, points[-1].reason if points else "")
        if point.reason:
            console.print(f"length {length:,}: {point.reason}", highlight=False)
        points.append(point)
    rows = loaded.recipe.data.batch_size * loaded.recipe.trainer.accumulate
    return Lengths(loaded.name, task.length_unit, rows, points)


def _point(length: int, recipe: Recipe, data: Splits, console: Console, shorter: str) -> Point:
    try:
        parts = build(recipe, data)
    except ValueError as error:
        raise RecipeError(f"--lengths {length}: {error}") from None
    assert parts.cost is not None
    tokens = parts.cost.main.tokens
    if shorter:
        return Point(length, tokens, None, shorter if shorter.startswith("not measured") else f"not measured: a shorter one has {shorter}")
    if (needed := _activations(parts)) > memory_here() and not torch.cuda.is_available():
        # The system would end the process.
        return Point(
            length, tokens, None, f"not enough memory: {needed / 2**30:,.1f} GiB of activations, and {memory_here() / 2**30:,.1f} GiB"
        )
    batch = task_named(recipe.task).noise(parts.model.config, recipe.data.batch_size, length)
    try:
        return Point(length, tokens, bench_models({"compressed": parts}, recipe, console, batch=batch))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Point(length, tokens, None, "not enough memory")


def _activations(parts: RunParts) -> float:
    """Estimated bytes that a dense step holds for backward."""
    assert parts.cost is not None
    whole = parts.cost().dense_activation_bytes * parts.recipe.data.batch_size
    return whole / (2 if parts.recipe.trainer.precision == "bf16" else 1)
