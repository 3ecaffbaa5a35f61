"""The LightningModule that tasks share: trace and budget of a step, bad rows, evaluation over ranks, optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.rows import BadRow, BadRowCount, BadRows
from ..modules.budget.budget import Budget
from ..modules.budget.schedules import progress
from ..modules.checkpoints.training_checkpoint import KEY, STATE_PREFIX, about, of_same_model
from ..modules.cost.stack_use import StackUse
from ..modules.decoding.generation import can_look_ahead
from ..modules.stage import stages_of
from ..modules.tokens.keep_count import KeepCount
from ..modules.tokens.trace import Trace
from .build.optimization import learning_rate_schedule
from .build.part_rates import optimizer_of
from .build.parts import RunParts
from .distributed import collective
from .distributed.zero3 import kept_names, save_trained
from .errors import RecipeError
from .losses.distillation import DistillationLoss
from .losses.teachers import teacher_of
from .metrics.kept_places import KeptPlaces
from .metrics.lookahead import LookAhead
from .metrics.quality import Quality
from .recipe.schema import OptimizerRecipe
from .tasks.base import PROBES, Task

# Keys of a checkpoint.
_DATA, _ROWS, _BUDGET = "data", "bad_rows", "budget"


class TaskModule(lightning.LightningModule):
    """Trains a dense or compressed model. A task's own module overrides ``losses`` or ``prepared``.

    Args:
        task: task to train.
        parts: parts of the run.
    """

    def __init__(self, task: type[Task], parts: RunParts) -> None:
        super().__init__()
        recipe = parts.recipe
        self.task = task
        self.model: PreTrainedModel = parts.model
        self.optimizer_recipe: OptimizerRecipe = recipe.optimizer
        self.total_steps = parts.total_steps
        self.budget: Budget | None = parts.budget
        self.cost = parts.cost
        self.seed = recipe.seed
        self.training_keep = recipe.training_keep
        self.phases = parts.phases
        self.teacher = teacher_of(parts)
        self.base = parts.base
        self.save_beside = parts.data.save_beside
        self.data_record = parts.data.record
        # A checkpoint on frozen weights has only trainable tensors; on_load_checkpoint checks that all of them are there.
        self.strict_loading = parts.base is None
        self.bad_rows = parts.data.bad_rows(recipe.data.max_bad_fraction)
        self.validation_rows = BadRowCount(self.bad_rows.allowed)
        self.validated = False
        self._start_counting()

    def _start_counting(self) -> None:
        self.ahead = LookAhead(self.task.quality()) if can_look_ahead(self.model) else None
        self.quality: Quality = self.task.quality()
        self._rows = 0
        self._kept = KeepCount()
        self._places = KeptPlaces()
        self._bad: list[BadRow] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Returns the result of ``losses`` at the drawn keep, for callbacks; its ``loss`` is the mean over all keeps of the step."""
        self._check_rows(batch)
        if self.training_keep is None:
            return self.losses(batch)
        found = [self.losses(batch, keep) for keep in self.training_keep.keeps(self.global_step, self.total_steps, self.seed)]
        return {**found[0], "loss": torch.stack([each["loss"] for each in found]).mean()}

    def losses(self, batch: dict[str, Any], keep: float | None = None) -> dict[str, Any]:
        """Losses of one forward of a training step, without counting bad rows.

        Args:
            batch: the batch.
            keep: keep of every stage in place of the drawn one.

        Returns:
            ``loss`` with gradient, the task's own ``task_loss``, ``trace`` (or None), ``budget`` (a BudgetLoss or None) and
            ``distillation`` (a DistillationLoss or None).
        """
        batch, trace = self.prepared(batch), self.training_trace(batch, keep)
        taught = None if self.teacher is None else self.teacher(self.task, self.model, batch, trace)
        if self.teacher is None or taught is None:
            task_loss = self.task.loss(self.model, batch, **self.with_trace(trace))
            return self.total(batch, task_loss, task_loss, trace)
        learned = self.task.learn(self.model, batch, taught, self.teacher.recipe, **self.with_trace(trace))
        return self.total(batch, learned.total, learned.labels, trace, learned)

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch that a step learns from; teacher and student get the same one."""
        return batch

    def total(
        self, batch: dict[str, Any], loss: Tensor, task_loss: Tensor, trace: Trace | None, distillation: DistillationLoss | None = None
    ) -> dict[str, Any]:
        """The result of ``losses``: ``loss`` plus the budget's loss, or without a budget plus the estimators' auxiliary loss.

        The losses of the task are means over the batch; here they get the weight of the batch in its optimizer step.
        """
        share = _share(batch)
        loss, task_loss = loss * share, task_loss.detach() * share
        of_budget = None
        if trace is not None and trace.routings:
            if self.budget is not None:
                of_budget = self.budget.loss(trace, self.global_step)
                loss = loss + of_budget.total
            elif trace.auxiliary_loss is not None:
                loss = loss + trace.auxiliary_loss
        return {"loss": loss, "task_loss": task_loss, "trace": trace, "budget": of_budget, "distillation": distillation}

    def training_trace(self, batch: dict[str, Any], keep: float | None = None) -> Trace | None:
        """The trace of a training forward, with ``keep`` in place of the drawn one; None for a dense model."""
        if not hasattr(self.model.config, "compression"):
            return None
        if self.budget is not None:
            return self.budget.trace(self.global_step, batch["sample_ids"])
        done = progress(self.global_step, 1.0, self.total_steps)
        trace = Trace(step=self.global_step, seed=self.seed, sample_ids=batch["sample_ids"], progress=done)
        if self.training_keep is not None:
            drawn = self.training_keep.keep(self.global_step, self.total_steps, self.seed) if keep is None else keep
            trace.keep = {name: drawn for name, stage in stages_of(self.model).items() if not stage.config.left_out}
        elif self.phases is not None:
            phase = self.phases.at(self.global_step)
            trace.keep, trace.idle = self.phases.keep(phase), self.phases.idle(phase)
        return trace

    @staticmethod
    def with_trace(trace: Trace | None) -> dict[str, Trace]:
        """The trace as an argument of the model, if there is one."""
        return {} if trace is None else {"trace": trace}

    def on_validation_epoch_start(self) -> None:
        self._start_counting()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        batches = self.trainer.val_dataloaders.batch_sampler
        # A signal that stops the run ends a validation early; a metric of some of the rows is none.
        self.validated = batch_index + 1 == len(batches)
        return self._evaluate(batch, counted=batch_index < batches.counted)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        counted = batch_index < self.trainer.test_dataloaders.batch_sampler.counted
        found = self._evaluate(batch, counted)
        if counted and found["trace"] is not None and self.cost is not None:
            # For the report, so that validations are not slowed down.
            self._places.add(self.task.kept_cells(self.model, found["trace"], batch))
        if self.ahead is not None and "sample_ids" not in batch:
            blank_forward(self.task, self.model)
        elif self.ahead is not None:
            trace = Trace(seed=self.seed, sample_ids=batch["sample_ids"], lookahead=True)
            out = self.task.forward(self.model, batch, trace=trace)
            if counted:
                self.ahead.add(out, batch, trace)
        return found

    def _evaluate(self, batch: dict[str, Any], counted: bool) -> dict[str, Any]:
        """A forward without gradient; padding batches, which exist so that every rank calls the same modules, are not counted."""
        if counted:
            self._rows += batch["rows"]
            self._bad += batch["bad"]
        if "sample_ids" not in batch:
            blank_forward(self.task, self.model)
            return {"trace": None}
        compressed = hasattr(self.model.config, "compression")
        trace = Trace(seed=self.seed, sample_ids=batch["sample_ids"]) if compressed else None
        out = self.task.forward(self.model, batch, **self.with_trace(trace))
        if counted:
            self.quality.add(out, batch)
            if trace is not None and self.cost is not None:
                self._kept.add(trace, self.cost, len(batch["sample_ids"]))
        return {"trace": trace}

    def on_validation_epoch_end(self) -> None:
        if not self.validated:
            return
        self._sum_over_ranks()
        # Not part of the run's count: a resumed run does not repeat the validation that its checkpoint was saved before.
        self.validation_rows = BadRowCount(self.bad_rows.allowed, self._rows, "validation")
        self.validation_rows.add(self._rows, self._bad)
        self.log(f"val/{self.task.metric}", self.quality.value, prog_bar=True, batch_size=1)

    def on_test_epoch_end(self) -> None:
        self._sum_over_ranks()
        self.bad_rows.add_split("test", self._rows, self._bad)
        self.log(f"test/{self.task.metric}", self.quality.value, batch_size=1)

    def _sum_over_ranks(self) -> None:
        """Sums the counts of all ranks on every rank, before any division."""
        ranks = collective.gather((self.quality, self._rows, self._bad, self._kept, self._places, self.ahead))
        self._start_counting()
        for quality, rows, bad, kept, places, ahead in ranks:
            self.quality.merge(quality)
            if self.ahead is not None:
                self.ahead.merge(ahead)
            self._rows += rows
            self._bad += bad
            self._kept.merge(kept)
            self._places.merge(places)

    @property
    def achieved_keep(self) -> dict[str, float]:
        """Achieved keep by stage over the last validation or test, summed before the division."""
        return self._kept.achieved

    @property
    def position_bias(self) -> dict[str, Any]:
        """Position bias by stage over the last test, empty behind a validation: ``KeptPlaces.bias``."""
        return self._places.bias

    @property
    def achieved_uses(self) -> dict[str, StackUse]:
        """StackUse by stack over the last validation or test; empty for a model of one stack."""
        return {name: use for name, use in self._kept.uses.items() if self.cost is not None and name in self.cost.by_stack}

    @property
    def achieved(self) -> dict[str, float]:
        """``macs_ratio`` and ``mean_token_fraction`` of all rows of the last validation or test, each with its own token counts."""
        return {"macs_ratio": self._kept.macs_ratio, "mean_token_fraction": self._kept.mean_token_fraction}

    def _check_rows(self, batch: dict[str, Any]) -> None:
        """Counts the batches of all ranks; an error on one rank is raised on all, because they wait for each other."""
        empty = "sample_ids" not in batch
        rows, bad, empties = collective.total([batch["rows"], len(batch["bad"]), empty])
        named = [BadRow(*row) for found in collective.gather([tuple(row) for row in batch["bad"]]) for row in found] if bad else []
        self.bad_rows.add(int(rows), named)
        if empties:
            raise BadRows(f"every row of a training batch is bad: {self.bad_rows.summary()}")

    def save_weights(self, folder: Path) -> None:
        """Writes the current weights, whole, into a run or checkpoint. Every rank must call this."""
        save_trained(self.model, folder, self.base, beside=self.save_beside)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records the model and base of the weights, the facts about the data and the bad rows so far, and removes frozen weights."""
        checkpoint[KEY] = about(self.model, self.base)
        if self.budget is not None:
            checkpoint[_BUDGET] = self.budget.state_dict()
        checkpoint[_DATA] = self.data_record
        checkpoint[_ROWS] = {"seen": self.bad_rows.seen, "reasons": self.bad_rows.reasons, "first": self.bad_rows.first}
        if self.base is not None:
            kept = {STATE_PREFIX + name for name in kept_names(self.model)}
            checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises RecipeError if the checkpoint belongs to another base or other data, or if its tensors differ from the trainable ones."""
        if not of_same_model(checkpoint[KEY], self.model, self.base):
            raise RecipeError(
                "the checkpoint belongs to another model, to other classes or to other frozen weights: start a new run with another output"
            )
        changed = [name for name, value in self.data_record.items() if checkpoint[_DATA].get(name) != value]
        if changed:
            raise RecipeError(
                f"the data have changed since the checkpoint was saved, in {', '.join(changed)}: restore the files and the run's folder "
                "data/, or start a new run from its weights, with model.name and another output"
            )
        if self.budget is not None and self.budget.controller is not None:
            try:
                self.budget.load_state_dict(checkpoint.get(_BUDGET, {}))
            except ValueError as error:
                raise RecipeError(str(error)) from None
        for name, value in checkpoint[_ROWS].items():
            setattr(self.bad_rows, name, value)
        if self.base is not None and "state_dict" in checkpoint:
            lost = {STATE_PREFIX + name for name in kept_names(self.model)} ^ checkpoint["state_dict"].keys()
            if lost:
                raise RecipeError(f"the checkpoint and the trainable tensors differ in {', '.join(sorted(lost)[:3])}")

    def configure_optimizers(self) -> Any:
        recipe = self.optimizer_recipe
        optimizer = optimizer_of(self.model, recipe, fused=self.trainer.precision == "32-true")
        schedule = learning_rate_schedule(optimizer, recipe.schedule, self.total_steps, recipe.warmup, recipe.final)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def blank_forward(task: type[Task], model: PreTrainedModel) -> None:
    """A forward of noise in place of a batch without a good row: with partitioned parameters the other ranks need this rank's shards."""
    if collective.world_size() > 1:
        # An input may have several entries for a row, as many for each.
        model(**{key: value[: len(value) // PROBES].to(model.device) for key, value in task.probe(model.config).items()})


def _share(batch: dict[str, Any]) -> float:
    """Weight of a batch's mean loss, so that an optimizer step has the gradient of the mean over all terms of its batches and ranks.

    Gradients are averaged over the batches of a step and over ranks as if each had equally many terms (tokens, pixels, rows).
    """
    of_step = collective.total([batch.get("step_terms", batch["terms"])])[0]
    return float(batch["terms"] * batch.get("step_batches", 1) * collective.world_size() / max(1, of_step))
