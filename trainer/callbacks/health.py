"""Norms of the gradient, and warnings of routers that do not learn."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ...modules.stage import stages_of
from ..build.trainable import grouped
from ..measure.cures import Cures
from ..measure.router_health import WINDOW, Signs, warnings_of
from .progress import RunLog


class RouterHealth(Callback):
    """At every logged step: norms of the gradient by group of weights and by router, before clipping; and one warning for each stage and
    kind of fault, as soon as ``WINDOW`` logged steps in a row show it.

    Norms are those of the whole step, and stay on the device until it ends. DeepSpeed partitions gradients and frees them inside its own
    step: with it there are no norms, and faults that need them are not looked for.

    Args:
        log: output of the warnings.
        total_steps: optimizer steps of the run.
        every: steps between logged steps.

    Attributes:
        warnings: the warnings so far.
        norms: number, sum and largest of the logged norms by group.
    """

    def __init__(self, log: RunLog, total_steps: int, every: int) -> None:
        self.lines, self.total_steps, self.every = log, total_steps, every
        self.warnings: list[str] = []
        self.norms: dict[str, list[float]] = {}
        self._known: set[tuple[str, str]] = set()
        self._largest: dict[str, float] = {}
        self._windows: dict[str, deque[Signs]] = {}
        self._step_norms: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        windows = {name: [vars(signs) for signs in window] for name, window in self._windows.items()}
        return {
            "warnings": self.warnings,
            "known": sorted(self._known),
            "norms": self.norms,
            "largest": self._largest,
            "windows": windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warnings, self.norms, self._largest = (state_dict[key] for key in ("warnings", "norms", "largest"))
        self._known = {(stage, kind) for stage, kind in state_dict["known"]}
        self._windows = {name: deque((Signs(**signs) for signs in window), maxlen=WINDOW) for name, window in state_dict["windows"].items()}

    @property
    def report(self) -> dict[str, dict[str, float]]:
        """Mean and largest norm of the gradient by group, over the logged steps."""
        return {group: {"mean": total / number, "largest": most} for group, (number, total, most) in self.norms.items()}

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: Any) -> None:
        step = trainer.global_step + 1
        if hasattr(optimizer, "overflow") or not self._logs(step):
            return
        model: Any = module.model
        stages = {f"router {name}": stage for name, stage in stages_of(model).items()}
        groups = grouped(model) | {name: list(stage.scorer.parameters()) for name, stage in stages.items()}
        found = {name: _norm([p.grad for p in of_group if p.grad is not None]) for name, of_group in groups.items()}
        for name, stage in stages.items():
            if found[name] is None and stage.estimator is not None and any(p.requires_grad for p in groups[name]):
                # Nothing reached a scorer that should learn.
                found[name] = torch.zeros((), device=groups[name][0].device)
        self._step_norms = {name: norm for name, norm in found.items() if norm is not None}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self._logs(step):
            return
        norms, self._step_norms = self._step_norms, {}
        values = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}
        scalars = {}
        for name, value in values.items():
            router = name.removeprefix("router ")
            scalars[f"{router}/grad_norm" if router != name else f"train/grad_norm_{name}"] = value
            if router == name:
                number, total, most = self.norms.get(name, [0, 0.0, 0.0])
                self.norms[name] = [number + 1, total + value, max(most, value)]
            else:
                self._largest[router] = max(self._largest.get(router, 0.0), value)
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics(scalars, step)
        model: Any = module.model
        stages, cures = stages_of(model), Cures(module.budget)  # type: ignore[arg-type]
        for name, routing in ({} if outputs["trace"] is None else outputs["trace"].routings).items():
            stage = stages[name]
            if stage.estimator is None or stage.config.follows is not None or not routing.routed:
                continue
            window = self._windows.setdefault(name, deque(maxlen=WINDOW))
            window.append(Signs.of(routing, values.get(f"router {name}")))
            if len(window) < WINDOW:
                continue
            for kind, message in warnings_of(stage, window, self._largest.get(name), cures).items():
                if (name, kind) not in self._known:
                    self._known.add((name, kind))
                    self.warnings.append(f"step {step}: {message}")
                    self.lines.line(f"warning: {self.warnings[-1]}")

    def _logs(self, step: int) -> bool:
        return step % self.every == 0 or step == self.total_steps


def _norm(gradients: list[Tensor]) -> Tensor | None:
    """Scalar norm of all gradients together; None without any."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).norm() if gradients else None
