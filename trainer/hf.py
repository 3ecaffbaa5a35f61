"""Laconic in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from ..modules.budget.budget import Budget
from ..modules.budget.schedules import progress
from ..modules.cost.cost import CostModel
from ..modules.tokens.keep_count import KeepCount
from ..modules.tokens.trace import Trace

# File of the controller's state in a checkpoint of the Trainer.
CONTROLS = "budget.pt"


class BudgetMixin:
    """Adds traces, the budget's loss and logs of the achieved keep to a Trainer. Put it before the Trainer's class.

    A training forward has the trace ``budget.trace(global_step, sample_ids)``, and its loss is the Trainer's own (labels, smoothing or
    ``compute_loss_func``) plus ``budget.loss(trace, global_step).total``; without a budget, plus the estimators' auxiliary loss.
    Evaluation adds no loss. Logs and the metrics of ``evaluate`` have ``keep/<stage>`` and ``eval_keep/<stage>``: the share of kept
    tokens in this process's rows since the last log. With int64 ``sample_ids`` in the data set, a row's draws do not depend on its batch.

    Args:
        budget: budget of the model, which learns the number of optimizer steps here if it was not given; None if every stage has its own keep.

    Example:
        class BudgetTrainer(BudgetMixin, Trainer): ...   # the definition of laconic.BudgetTrainer
        BudgetTrainer(model=model, args=args, train_dataset=data, budget=budget).train()
    """

    def __init__(self, *args: Any, budget: Budget | None = None, **kwargs: Any) -> None:
        self.budget = budget
        self._kept, self._kept_in_evaluation = KeepCount(), KeepCount()
        super().__init__(*args, **kwargs)
        host: Any = self
        if not hasattr(getattr(host.model, "config", None), "compression"):
            raise ValueError("the model is not compressed: call laconic.compress(model, budget.compression) before making the Trainer")
        self._cost = CostModel(host.model)
        if host.args.n_gpu > 1:
            raise ValueError(
                f"{host.args.n_gpu} GPUs in one process would share a trace: start one process a GPU (torchrun --nproc-per-node), "
                "or make only one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The Trainer's loss; in training, plus the budget's loss."""
        host: Any = self
        step, inputs = host.state.global_step, dict(inputs)
        sample_ids = inputs.pop("sample_ids", None)
        training = model.training
        if training and self.budget is not None:
            if self.budget.total_steps == 1:
                # Not given: the Trainer knows it.
                self.budget.total_steps = host.state.max_steps
            trace = self.budget.trace(step, sample_ids)
        else:
            trace = Trace(step=step if training else 0, seed=host.args.seed, sample_ids=sample_ids)
            trace.progress = progress(step, 1.0, host.state.max_steps) if training else 1.0
        # The Trainer may remove the labels from the inputs and compute the loss itself; estimators need them in any case.
        trace.labels = inputs.get("labels")
        parent: Any = super()
        loss, outputs = parent.compute_loss(
            model, {**inputs, "trace": trace}, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        rows = next(len(value) for name, value in inputs.items() if name in ("input_ids", "pixel_values", "inputs_embeds"))
        (self._kept if training else self._kept_in_evaluation).add(trace, self._cost, rows)
        if training:
            added = self._added(trace)
            if added is not None:
                loss = loss + (added / host.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else added)
        return (loss, outputs) if return_outputs else loss

    def _added(self, trace: Trace) -> torch.Tensor | None:
        """The loss of the budget, without one that of estimators and selectors; None if there is none to add."""
        if self.budget is None:
            return trace.auxiliary_loss
        if trace.routings:
            return self.budget.loss(trace, trace.step).total
        # Stages of a vision tower did not run: no row of the batch has an image.
        host: Any = self
        if host.args.world_size > 1 and (self.budget.controller is not None or self.budget.regularizer is not None):
            raise ValueError(
                "no stage ran for this process's batch, whose rows have no image, while the budget counts over all processes: give every "
                "batch of every process a row with an image"
            )
        return None

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """True if the Trainer treats the loss as its share of the whole step and does not divide it by the accumulation."""
        host: Any = self
        scaled = getattr(host, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return bool(scaled)
        return host.compute_loss_func is not None or (host.model_accepts_loss_kwargs and num_items_in_batch is not None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parent: Any = super()
        parent._save_optimizer_and_scheduler(output_dir)
        host: Any = self
        if self.budget is not None and host.args.should_save:
            torch.save(self.budget.state_dict(), Path(output_dir) / CONTROLS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        parent._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.budget is None or self.budget.controller is None:
            return
        found = Path(checkpoint) / CONTROLS
        self.budget.load_state_dict(torch.load(found, weights_only=True) if found.is_file() else {})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the achieved keep since the last log."""
        # Evaluation logs ``eval_loss``, or another prefix that ``evaluate`` was called with; the end of training logs ``train_loss``.
        evaluated = next((key.removesuffix("loss") for key in logs if key.endswith("_loss") and key != "train_loss"), None)
        kept = self._kept if evaluated is None else self._kept_in_evaluation
        # In place, because ``evaluate`` returns this dictionary.
        logs.update({f"{evaluated or ''}keep/{name}": value for name, value in kept.achieved.items()})
        if kept.rows:
            logs[f"{evaluated or ''}macs_ratio"] = kept.macs_ratio
            logs[f"{evaluated or ''}mean_token_fraction"] = kept.mean_token_fraction
        kept.clear()
        parent: Any = super()
        parent.log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer removes columns that the model's forward does not name.
        parent: Any = super()
        parent._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        if "sample_ids" not in columns:
            columns.append("sample_ids")

    _signature_columns: list[str]


class BudgetTrainer(BudgetMixin, Trainer):
    """transformers' Trainer for a compressed model."""

    model: PreTrainedModel
