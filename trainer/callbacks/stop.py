"""SIGTERM: save, then stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from ..distributed import collective


class StopOnSigterm(Callback):
    """Finishes the batch, writes a checkpoint and ends the fit; ``stopped`` tells that it did.

    Args:
        checkpoint: file to write.

    Every rank is asked at every step, so that a signal to one of them stops all at the same step.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.stopped = False
        self._asked = False
        self._before: Any = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        # After Lightning has put its own handler there, which would end the process with 0.
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two micro-batches of a step, the gradients gathered so far would be lost.
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and not self.stopped and collective.any_rank(self._asked):
            self.stopped = True
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
