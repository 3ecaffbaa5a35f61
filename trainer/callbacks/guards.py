"""Stops a run whose gradient is not finite, and keeps the random state of all ranks in checkpoints."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from ..distributed import collective


class NotANumber(RuntimeError):
    """The gradient or the weights are no longer finite."""


def check_weights(module: torch.nn.Module, step: int) -> None:
    """Raises NotANumber on every rank if a weight of any rank is NaN or infinite."""
    finite = all(bool(torch.isfinite(p).all()) for p in module.parameters() if p.is_floating_point())
    if collective.any_rank(not finite):
        raise NotANumber(
            f"the weights are not finite after step {step}, and are not saved; the checkpoint before it, if there is one, is kept: "
            "lower optimizer.lr or optimizer.router_lr, or check the data"
        )


class NanGuard(Callback):
    """Stops every rank before an optimizer step with a gradient of NaN or infinity.

    Under DDP, averaged gradients are equal on all ranks. DeepSpeed partitions them, detects overflow over all ranks itself and skips
    the step silently; its ``overflow`` flag is therefore read after the step.
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
    """Keeps the generators of all ranks in checkpoints, so that dropout continues where it was.

    All other random draws of training depend on (seed, step, sample) and need no state.

    Args:
        seed: seed of the run; each rank's generator starts from it and the rank, so that ranks drop different elements.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        # Lightning calls this on every rank, and saves the result of rank 0.
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
