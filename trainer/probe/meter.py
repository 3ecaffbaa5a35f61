"""Meter: the loss of a model with some stages more, on the same batches every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...data.rows import BadRows, collate, on_device
from ...data.splits import Splits
from ...modules.backbones import adapter_of
from ...modules.budget.start_routers import Fitted, needs_fit, start_routers
from ...modules.checkpoints.adapter_saving import stage_state
from ...modules.checkpoints.tensors import copy_all
from ...modules.compress import compress, decompress
from ...modules.config import CompressionConfig, StageConfig
from ...modules.cost.cost import CostModel
from ...modules.stage import Stage, stages_of
from ...modules.tokens.trace import Trace
from ..losses.distillation import Taught
from ..recipe.schema import ITSELF, DistillationRecipe
from ..tasks.base import Task
from .attention_rank import attention_ranks

# The answers as they are, not softened.
_APART = DistillationRecipe(teacher=ITSELF, temperature=1.0)


@dataclass(frozen=True)
class Measured:
    """What stages do to a model, per answer.

    Attributes:
        loss: mean negative log-likelihood in nats.
        change: mean KL divergence from the answers of the model without these stages, in nats.
    """

    loss: float
    change: float


def batches_of(data: Splits, rows: int, batch_size: int, without: int = 0) -> list[dict[str, Any]]:
    """Batches of training rows from all over the split, or of its first rows if it is a stream.

    Args:
        data: the data.
        rows: number of rows.
        batch_size: rows of a batch.
        without: none of the rows that a call with this number of rows gives.

    Raises:
        BadRows: all of these rows are bad, or there are none.
    """
    number = data.train_rows

    def spread(rows: int) -> list[int]:
        return list(range(rows)) if number is None else np.unique(np.linspace(0, number - 1, min(rows, number)).astype(int)).tolist()

    others = set(spread(without)) if without else set()
    free = [place for place in range(rows + without if number is None else number) if place not in others] if others else []
    if others and not free:
        raise BadRows(f"all {number} training rows are measured, and parts are fitted to others: measure fewer rows")
    places = (
        [free[index] for index in np.unique(np.linspace(0, len(free) - 1, min(rows, len(free))).astype(int))] if others else spread(rows)
    )
    good = [item for item in (data.train[place] for place in places) if "bad" not in item]
    if not good:
        raise BadRows(f"all of the {len(places)} rows that would be measured are bad")
    return [collate(good[start : start + batch_size]) for start in range(0, len(good), batch_size)]


class Meter:
    """Measures a model with stages beside its own. The model is dense between two measurements.

    Args:
        model: dense or compressed model in evaluation mode; it is changed.
        task: its task.
        batches: batches of the task's data.
        size: size of an input, for costs.
        seed: seed of random draws.

    Raises:
        BadRows: the batches have nothing to predict.

    Attributes:
        config: the model's own stages; None for a dense model.
        answers: number of answers of the batches: predicted tokens, or labels.
        whole: the model as it is.
    """

    def __init__(
        self, model: PreTrainedModel, task: type[Task], batches: Sequence[dict[str, Any]], size: tuple[int, int] | int | None, seed: int = 0
    ) -> None:
        self.task, self.size, self.seed = task, size, seed
        device = model.device
        self.batches = [on_device(batch, device) for batch in batches]
        self.config: CompressionConfig | None = None
        self._trained: dict[str, Tensor] = {}
        self._fitted: dict[str, dict[str, Tensor]] = {}
        if stages_of(model):
            self.config = CompressionConfig.from_dict(model.config.compression)
            self._trained = {name: value.clone() for name, value in stage_state(model).items()}
            model = decompress(model)
        self.model = model
        self.answers = sum(int(batch["terms"]) for batch in batches)
        if not self.answers:
            raise BadRows("the rows that would be measured have nothing to predict: their loss would be 0, whatever the model is")
        self._reference = self._taught()
        self.whole = self(())

    @torch.no_grad()
    def __call__(self, stages: Sequence[StageConfig]) -> Measured:
        """Loss and change of answers with these stages."""
        loss, change = 0.0, 0.0
        with self._with(stages) as model:
            if unfitted := [name for name, stage in stages_of(model).items() if needs_fit(stage)]:
                raise ValueError(f"stages {', '.join(unfitted)} have parts that are not fitted: call fit before")
            for batch, taught in zip(self.batches, self._reference, strict=True):
                known = Taught(taught.answers.to(model.device))
                found = self.task.learn(model, batch, known, _APART, **self._traced(model, batch))
                loss += float(found.labels) * int(batch["terms"])
                change += float(found.answers) * int(batch["terms"])
        return Measured(loss / self.answers, change / self.answers)

    def fit(self, stages: Sequence[StageConfig], batches: Sequence[dict[str, Any]]) -> Fitted:
        """Fits scorers and shortcuts of stages to other batches of the model as it is; measurements with these parts use them from now on.

        Args:
            stages: at most one at a site.
            batches: batches with other rows than the measured ones.
        """

        def run(model: PreTrainedModel, batch: dict[str, Any], trace: Trace) -> Any:
            given = on_device(batch, model.device)
            trace.sample_ids = given["sample_ids"]
            return self.task.forward(model, given, trace=trace)

        with self._with(stages) as model:
            found = start_routers(model, batches, run, self.seed)
            for name, stage in stages_of(model).items():
                self._fitted.setdefault(name, {}).update({key: value.clone() for key, value in _parts_of(stage).state_dict().items()})
        return found

    @torch.no_grad()
    def _taught(self) -> list[Taught]:
        """Answers of the model as it is."""
        with self._with(()) as model:
            return [Taught(self.task.teach(model, batch, _APART, **self._traced(model, batch)).answers.cpu()) for batch in self.batches]

    @torch.no_grad()
    def updates(self, stages: Sequence[StageConfig]) -> dict[str, tuple[float, float]]:
        """Mean relative size of what a layer changes in a token, and 1 − mean cosine before and after it (block influence, arXiv
        2403.03853), by name of stages that process every token."""
        sums: dict[str, list[tuple[float, float]]] = {}
        with self._with(stages) as model:
            for batch in self.batches:
                options = self._traced(model, batch, updates=stages_of(model))
                self.task.forward(model, batch, **options)
                for name, routing in options["trace"].routings.items():
                    if routing.update is not None:
                        sums.setdefault(name, []).append(routing.update.mean())
        return {
            name: (sum(size for size, _ in found) / len(found), 1 - sum(cos for _, cos in found) / len(found))
            for name, found in sums.items()
        }

    def attention_ranks(self) -> list[float]:
        """ARank of each layer of a causal language model without stages of its own; empty for other models."""
        stack = adapter_of(self.model).main_stack(self.model)
        if self.config is not None or not stack.adapter.causal or stack.visual:
            return []
        return attention_ranks(self.model, self.batches)

    def macs_ratio(self, stages: Sequence[StageConfig]) -> float:
        """MACs of a forward with these stages ÷ MACs of the dense model."""
        config = self._config(stages)
        return 1.0 if config is None else CostModel(self.model, config, self.size)().macs_ratio

    def _config(self, stages: Sequence[StageConfig]) -> CompressionConfig | None:
        if self.config is not None:
            return self.config.with_stages([*self.config.stages, *stages])
        return adapter_of(self.model).resolved(CompressionConfig(stages), self.model.config) if stages else None

    def _traced(self, model: PreTrainedModel, batch: dict[str, Any], **given: Any) -> dict[str, Trace]:
        stages = stages_of(model).values()
        # An exact choice among all tokens of a row.
        ahead = any(not stage.deployable for stage in stages)
        return {"trace": Trace(seed=self.seed, sample_ids=batch["sample_ids"], lookahead=ahead, **given)} if stages else {}

    @contextmanager
    def _with(self, stages: Sequence[StageConfig]) -> Iterator[PreTrainedModel]:
        config = self._config(stages)
        if config is None:
            yield self.model
            return
        model = compress(self.model, config).eval()
        try:
            state = stage_state(model)
            copy_all({name: state[name] for name in self._trained}, self._trained, "the model's own stages")
            own = set() if self.config is None else {stage.key for stage in self.config.stages}
            for name, stage in stages_of(model).items():
                if name not in own and name in self._fitted:
                    # A stage without tokens has no scorer.
                    parts = _parts_of(stage)
                    known = {key: value for key, value in self._fitted[name].items() if key in parts.state_dict()}
                    parts.load_state_dict(known, strict=False)
                if name not in own and stage.config.keep is not None:
                    # Random scores are uniform in (0, 1).
                    stage.selector.set_cut(stage.config.keep)
            yield model
        finally:
            self.model = decompress(model)


def _parts_of(stage: Stage) -> nn.ModuleDict:
    """The parts of a stage that are fitted."""
    return nn.ModuleDict({"scorer": stage.scorer} | ({} if stage.shortcut is None else {"shortcut": stage.shortcut}))
