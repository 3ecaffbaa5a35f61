"""What stops a run that has gone wrong, and what a checkpoint needs beside the weights."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class NotANumber(RuntimeError):
    """The loss is no longer finite."""


class NanGuard(Callback):
    """Stops before the optimizer step that a gradient of NaN or infinity would poison."""

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: Any) -> None:
        norms = torch._foreach_norm([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        if not torch.isfinite(torch.stack(norms).sum()):
            raise NotANumber(
                f"the gradient is not finite at step {trainer.global_step}: lower optimizer.lr or optimizer.router_lr, or check the data"
            )


class RandomState(Callback):
    """Keeps torch's generators in the checkpoint, so that dropout goes on where it was (one process).

    Everything else that is drawn in training comes from (seed, step, sample), and needs no state.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self._loaded is None:
            return
        torch.set_rng_state(self._loaded["cpu"].cpu())
        if self._loaded["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._loaded["cuda"]])
