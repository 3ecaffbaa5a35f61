"""Image classification."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ...data.images import BadRow, BadRowCount, BadRows
from ...data.mixing import Mixing, soft_labels
from ...modules.budget.budget import Budget
from ...modules.state import KeepCount, Trace
from .. import collective
from ..distillation import Distillation
from ..optimization import learning_rate_schedule, parameter_groups
from ..recipe import OptimizerRecipe


class ImageClassification(lightning.LightningModule):
    """Trains a classifier, dense or compressed.

    Args:
        model: takes ``pixel_values`` and ``labels``, gives ``loss`` and ``logits``.
        optimizer: its settings.
        total_steps: optimizer steps of the run.
        budget: of a compressed model whose budget decides; None trains by the task's loss and the estimators' alone.
        seed: of the draws.
        max_bad_fraction: share of bad rows past which the run stops.
        expected_rows: rows of the training data, of which the share is taken.
        mixing: of training images and labels; None mixes none.
        label_smoothing: share of a training label that is spread over all classes.
        distillation: a teacher to learn from as well; None has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerRecipe,
        total_steps: int,
        budget: Budget | None = None,
        seed: int = 0,
        max_bad_fraction: float = 0.0,
        expected_rows: int = 0,
        mixing: Mixing | None = None,
        label_smoothing: float = 0.0,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_recipe = optimizer
        self.total_steps = total_steps
        self.budget = budget
        self.seed = seed
        self.bad_rows = BadRowCount(max_bad_fraction, expected_rows)
        self.mixing, self.label_smoothing, self.distillation = mixing, label_smoothing, distillation
        self._start_counting()

    def _start_counting(self) -> None:
        self._correct = self._seen = self._rows = 0
        self._kept = KeepCount()
        self._bad: list[BadRow] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Returns ``loss``, the task's own ``task_loss``, ``trace``, ``budget`` (a BudgetLoss or None) and ``distillation`` (a
        DistillationLoss or None) for callbacks."""
        self._check_rows(batch)
        return self.losses(batch)

    def losses(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a training step computes, without the count of bad rows."""
        trace, loss = self._trace(batch), None
        pixels, labels = self._prepared(batch)
        options = self._with(trace) | (self.distillation.student_options if self.distillation is not None else {})
        if labels.is_floating_point():
            # transformers' models take whole labels only; estimators find the soft ones on the trace.
            if trace is not None:
                trace.labels = labels
            out = self.model(pixel_values=pixels, **options)
            task_loss = functional.cross_entropy(out.logits.float(), labels)
        else:
            out = self.model(pixel_values=pixels, labels=labels, **options)
            task_loss = out.loss
        taught = self.distillation(task_loss, out, pixels, trace) if self.distillation is not None else None
        total = task_loss if taught is None else taught.total
        if trace is not None and trace.routings:
            if self.budget is not None:
                loss = self.budget.loss(trace, self.global_step, collective.mean)
                total = total + loss.total
            elif trace.auxiliary_loss is not None:
                total = total + trace.auxiliary_loss
        return {"loss": total, "task_loss": task_loss.detach(), "trace": trace, "budget": loss, "distillation": taught}

    def _prepared(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Pixels, and labels int64 (B,) or, mixed or smoothed, float32 (B, classes)."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        if self.mixing is None and not self.label_smoothing:
            return pixels, labels
        labels = soft_labels(labels, self.model.config.num_labels, self.label_smoothing)
        if self.mixing is None:
            return pixels, labels
        mixed = self.mixing(pixels, labels, self.global_step, batch["sample_ids"])
        return mixed.pixel_values, mixed.labels

    def _trace(self, batch: dict[str, Any]) -> Trace | None:
        if not hasattr(self.model.config, "compression"):
            return None
        if self.budget is not None:
            return self.budget.trace(self.global_step, batch["sample_ids"])
        return Trace(step=self.global_step, seed=self.seed, sample_ids=batch["sample_ids"])

    @staticmethod
    def _with(trace: Trace | None) -> dict[str, Trace]:
        return {} if trace is None else {"trace": trace}

    def on_validation_epoch_start(self) -> None:
        self._start_counting()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        return self._evaluate(batch, counted=batch_index < self.trainer.val_dataloaders.batch_sampler.counted)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        return self._evaluate(batch, counted=batch_index < self.trainer.test_dataloaders.batch_sampler.counted)

    def _evaluate(self, batch: dict[str, Any], counted: bool) -> dict[str, Any]:
        """A forward without gradient; batches that are only there so that every rank calls the same modules are not counted."""
        if counted:
            self._rows += batch["rows"]
            self._bad += batch["bad"]
        if "labels" not in batch:
            if collective.world_size() > 1:
                # With parameters spread over ranks, the others wait for this one's part.
                self.model(pixel_values=self._blank())
            return {"trace": None}
        compressed = hasattr(self.model.config, "compression")
        trace = Trace(seed=self.seed, sample_ids=batch["sample_ids"]) if compressed else None
        out = self.model(pixel_values=batch["pixel_values"], **self._with(trace))
        if counted:
            self._correct += int((out.logits.argmax(-1) == batch["labels"]).sum())
            self._seen += len(batch["labels"])
            if trace is not None:
                self._kept.add(trace)
        return {"trace": trace, "logits": out.logits}

    def _blank(self) -> Tensor:
        """One black image of the model's size."""
        config = self.model.config
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return torch.zeros(1, config.num_channels, size, size, device=self.device)

    def on_validation_epoch_end(self) -> None:
        self._sum_over_ranks()
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self._sum_over_ranks()
        self.log("test/accuracy", self.accuracy)

    def _sum_over_ranks(self) -> None:
        """Counts of all ranks on every rank, before anything is divided. Raises BadRows on all of them or on none."""
        ranks = collective.gather((self._correct, self._seen, self._rows, self._bad, self._kept))
        self._start_counting()
        for correct, seen, rows, bad, kept in ranks:
            self._correct += correct
            self._seen += seen
            self._rows += rows
            self._bad += bad
            self._kept.merge(kept)
        self.bad_rows.add(self._rows, self._bad)

    @property
    def accuracy(self) -> float:
        """Share of right answers over the last validation or test."""
        return self._correct / max(1, self._seen)

    @property
    def achieved_keep(self) -> dict[str, float]:
        """Hard keep by stage over the last validation or test, summed before dividing."""
        return self._kept.achieved

    def _check_rows(self, batch: dict[str, Any]) -> None:
        """Counts the batches of all ranks; what stops one of them stops all, since they wait for each other."""
        empty = "labels" not in batch
        rows, bad, empties = collective.total([batch["rows"], len(batch["bad"]), empty])
        named = [BadRow(*row) for found in collective.gather([tuple(row) for row in batch["bad"]]) for row in found] if bad else []
        self.bad_rows.add(int(rows), named)
        if empties:
            raise BadRows(f"every row of a training batch is bad: {self.bad_rows.summary()}")

    def configure_optimizers(self) -> Any:
        recipe = self.optimizer_recipe
        groups = parameter_groups(self.model, recipe.lr, recipe.router_lr, recipe.weight_decay, recipe.layer_decay)
        # Lightning cannot clip the gradients of a fused optimizer under autocast.
        fused = self.trainer.precision == "32-true"
        optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=fused)
        schedule = learning_rate_schedule(optimizer, recipe.schedule, self.total_steps, recipe.warmup, recipe.final)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
