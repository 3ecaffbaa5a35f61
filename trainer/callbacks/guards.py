"""What stops a run that has gone wrong, and what a checkpoint needs beside the weights."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from ..distributed import collective


class NotANumber(RuntimeError):
    """The loss is no longer finite."""


class NanGuard(Callback):
    """Stops before the optimizer step that a gradient of NaN or infinity would poison, on every rank together.

    Averaged gradients are the same on all ranks under DDP. DeepSpeed, which partitions them, finds out itself, over all ranks, and
    leaves the step out; it goes on without a word then, so its note is read after the step.
    """

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: Any) -> None:
        if hasattr(optimizer, "overflow"):
            return
        norms = torch._foreach_norm([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        if not torch.isfinite(torch.stack(norms).sum()):
            self._stop(trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if getattr(trainer.optimizers[0], "overflow", False):
            self._stop(trainer.global_step - 1)

    @staticmethod
    def _stop(step: int) -> None:
        raise NotANumber(f"the gradient is not finite at step {step}: lower optimizer.lr or optimizer.router_lr, or check the data")


class RandomState(Callback):
    """Keeps the generators of all ranks in the checkpoint, so that dropout goes on where it was.

    Everything else that is drawn in training comes from (seed, step, sample), and needs no state.

    Args:
        seed: of the run; each rank's generator starts from it and the rank, or they would all drop the same places.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        # Lightning asks every rank for this, and saves what rank 0 says.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return {"ranks": collective.gather({"cpu": torch.get_rng_state(), "cuda": cuda})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["ranks"][collective.rank()]

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self._loaded is None:
            if collective.world_size() > 1:
                torch.manual_seed(self.seed * 1_000_003 + collective.rank())
            return
        torch.set_rng_state(self._loaded["cpu"].cpu())
        if self._loaded["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._loaded["cuda"].cpu())
