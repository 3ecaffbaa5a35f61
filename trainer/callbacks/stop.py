"""SIGTERM: save, then stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from ..distributed import collective


class StopOnSigterm(Callback):
    """Finishes the batch, writes a checkpoint and ends the fit; ``stopped`` is then True.

    Args:
        checkpoint: file to write.

    All ranks exchange the signal at every step, so that a signal to one of them stops all at the same step.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.stopped = False
        self._requested = False
        self._before: Any = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        # Set after Lightning's own handler, which would end the process with exit code 0.
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._requested = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Stopping between micro-batches would lose the accumulated gradients.
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and not self.stopped and collective.any_rank(self._requested):
            self.stopped = True
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
