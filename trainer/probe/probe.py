"""``laconic probe``: what each layer and half of a layer is worth, by the loss without it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...modules.backbones import adapter_of
from ...modules.backbones.stack import Stack
from ..build.trained_model import opened_data, trained_model
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from ..tasks.base import Task, task_named
from .meter import Measured, Meter, batches_of
from .part import SITES, Part, offered, state_key
from .record import Record

HALF = 0.5
# Rows that parts are fitted to.
FIT_ROWS = 32


@dataclass(frozen=True)
class Options:
    """Settings of a probe.

    Attributes:
        rows: training rows that are measured.
        batch_size: rows of a forward.
        scope: scope of the stages; None takes the first that the stack offers, all tokens or the visual ones.
    """

    rows: int = 16
    batch_size: int = 4
    scope: str | None = None


class Probe:
    """Measures the parts of a model's main stack.

    Args:
        target: the model, for the record.
        recipe: recipe of its task and data.
        weights: folder or hub name of the weights.
        options: settings.
        to: JSON file of the measurements; an existing one is continued.
        console: console for progress.

    Raises:
        RecipeError: the model cannot be probed, or the file belongs to another probe.
    """

    def __init__(self, target: str, recipe: Recipe, weights: str, options: Options, to: Path, console: Console) -> None:
        task, model = task_named(recipe.task), trained_model(weights, recipe.task, target)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.stack: Stack = adapter_of(model).main_stack(model)
        self.scope = options.scope or self.stack.scopes[0]
        if self.scope not in self.stack.scopes:
            raise RecipeError(f"--scope {self.scope} is not offered by this model: it has {', '.join(self.stack.scopes)}")
        settings = {
            "model": target,
            "task": recipe.task,
            "data": recipe.data.model_dump(mode="json", exclude={"workers", "batch_size", "eval_batch_size"}),
            "seed": recipe.seed,
            "rows": options.rows,
            "scope": self.scope,
        }
        self.record, self.console = Record(to, settings), console
        if task.teach.__func__ is Task.teach.__func__:  # type: ignore[attr-defined]
            raise RecipeError(f"task = {recipe.task} has no labels by which a layer could be measured: probe a model of another task")
        data = opened_data(task.of_run(recipe, RunFolder.of(weights)), model.config, model, target)
        self.meter = Meter(model, task, batches_of(data, options.rows, options.batch_size), task.size(recipe), recipe.seed)
        self.others = functools.partial(batches_of, data, FIT_ROWS, options.batch_size, options.rows)
        self._fitted: set[tuple[str, str | None]] = set()
        own = () if self.meter.config is None else self.meter.config.of_stack(self.stack.name)
        self.parts = offered(self.stack, [int(stage.layer) for stage in own])
        self._done, self._began = 0, time.monotonic()
        before, now = self.record.measured.get(""), self.meter.whole
        if before is not None and not math.isclose(before.loss, now.loss, rel_tol=1e-3):
            raise RecipeError(
                f"--to {to} was measured with other weights: their loss was {before.loss:.4f}, and now it is {now.loss:.4f}: name another "
                "file, or delete it"
            )
        self.record.add("", now)

    def measure(self, parts: Sequence[Part], left: int | None = None) -> Measured:
        """Loss and change of answers with these parts, from the record if they are in it.

        Args:
            parts: the parts, at most one around a layer.
            left: number of measurements after this one, for the progress; None if it is unknown.
        """
        key = state_key(parts)
        if key not in self.record.measured:
            self._fit(parts)
            found = self.meter([part.measured(self.stack, self.scope) for part in parts])
            self.record.add(key, found)
            self._done += 1
            ahead = "" if left is None else f"; {left} left, about {(time.monotonic() - self._began) / self._done * left:.0f} s"
            shown = key if len(parts) < 2 else f"{len(parts)} parts"
            self.console.print(f"{shown}: loss {found.loss:.4f} ({found.loss - self.meter.whole.loss:+.4f}){ahead}", highlight=False)
        return self.record.measured[key]

    def _fit(self, parts: Sequence[Part]) -> None:
        """Fits what these parts have to fit, at all layers at once, to rows that are not measured."""
        for scorer, shortcut in {(part.scorer if part.keep else "random", part.shortcut) for part in parts if part.fitted} - self._fitted:
            for together in (("around",), ("around_attention", "around_mlp")):
                these = [replace(part, keep=HALF, scorer=scorer, shortcut=shortcut) for part in self.parts if part.site in together]
                if these:
                    what = " and ".join(name for name in (scorer, shortcut) if name not in ("random", None))
                    self.console.print(f"fitting {what} {', '.join(together)} to {FIT_ROWS} rows", highlight=False)
                    self.meter.fit([part.measured(self.stack, self.scope) for part in these], self.others())
            self._fitted.add((scorer, shortcut))

    def run(self) -> None:
        """Measures every part left out, every layer with a random half of its tokens, what each part changes in a token, and ranks of attention."""
        halves = [Part(part.layer, part.site, HALF) for part in self.parts if part.site == "around"]
        todo = [part for part in [*self.parts, *halves] if part.key not in self.record.measured]
        for number, part in enumerate(todo):
            self.measure([part], len(todo) - number - 1)
        if not self.record.updates:
            for sites in (("around",), ("around_attention", "around_mlp")):
                stages = [Part(part.layer, part.site, 1.0).stage(self.stack, self.scope) for part in self.parts if part.site in sites]
                if stages:
                    self.record.updates |= self.meter.updates(stages)
            self.record.ranks = self.meter.attention_ranks()
            self.record.write()

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer: rise of the loss without each part and with a random half of the tokens, and updates of the layer."""
        dense = self.meter.whole.loss
        rows: dict[int, dict[str, Any]] = {}
        for part in self.parts:
            row = rows.setdefault(part.layer, {"layer": part.layer})
            found = self.record.measured[part.key]
            row[SITES[part.site]] = found.loss - dense
            if part.site == "around":
                prefix = f"{self.stack.name}." if self.stack.name else ""
                size, influence = self.record.updates.get(f"{prefix}around_{part.layer}", (float("nan"), float("nan")))
                half = self.record.measured[Part(part.layer, part.site, HALF).key].loss - dense
                row |= {"random half": half, "logit change": found.change, "block influence": influence, "update": size}
                if self.record.ranks:
                    row["ARank"] = self.record.ranks[part.layer]
        return list(rows.values())

    def table(self) -> Table:
        """The rows as a table."""
        rows = self.rows()
        what = f"{self.meter.answers:,} answers, loss {self.meter.whole.loss:.4f}, scope {self.scope}"
        table = Table(title=f"{self.record.settings['model']}: rise of the loss in nats without each part ({what})")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                *(
                    f"{value}" if isinstance(value := row.get(key), int) else f"{value:+.4f}" if value is not None else "–"
                    for key in columns
                )
            )
        return table
