"""Saves checkpoints during training, and stops a run when a signal asks for it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from ..distributed import collective
from ..distributed.resume import remove_checkpoint
from ..distributed.signals import Stopped, StopSignals
from ..run_folder import RunFolder
from .guards import check_weights

# Seconds between checkpoints if the recipe does not set steps: so much training is lost at most.
EVERY_SECONDS = 300.0


class Checkpoints(Checkpoint):
    """Saves ``checkpoints/STEP.ckpt`` every few steps or minutes, at the last step, and when a signal stops the run.

    A new checkpoint is complete before the older ones are removed. Weights that are not finite are not saved: the older checkpoint stays.

    Args:
        run: folder of the run.
        steps: optimizer steps of the run.
        every: steps between checkpoints; None saves every EVERY_SECONDS.
        signals: signals of this process. All ranks exchange them at every step, so that a signal to one of them stops all at one step.
        resumed: checkpoint that the run goes on from; it is not written again.
    """

    def __init__(self, run: RunFolder, steps: int, every: int | None, signals: StopSignals, resumed: Path | None = None) -> None:
        self.run, self.steps, self.every, self.signals = run, steps, every, signals
        self.saved = resumed
        self.stopped = 0
        self._since = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between micro-batches the accumulated gradients would be lost.
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        due = self.every is None and time.monotonic() - self._since > EVERY_SECONDS
        asked, late = collective.largest([self.signals.received or 0, due])
        if asked or late or step == self.steps or (self.every is not None and step % self.every == 0):
            self._save(trainer, module, step)
        if asked:
            self.stopped = int(asked)
            trainer.should_stop = True

    def check(self) -> None:
        """Raises Stopped on every rank if a signal reached one of them."""
        stopped = self.stopped or self._asked()
        if stopped:
            raise Stopped(
                stopped,
                f"stopped by {signal.Signals(stopped).name}; the last checkpoint is {self.saved}: repeat the same command with --resume auto "
                "to continue",
            )

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._asked():
            # Lightning ends the validation here. The step after it saves and stops.
            raise StopIteration

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Everything is saved already.
        self.check()

    def _asked(self) -> int:
        return int(collective.largest([self.signals.received or 0])[0])

    def _save(self, trainer: lightning.Trainer, module: lightning.LightningModule, step: int) -> None:
        path = self.run.checkpoints / f"{step}.ckpt"
        if path == self.saved:
            return
        check_weights(module, step)
        trainer.save_checkpoint(path)
        self.saved, self._since = path, time.monotonic()
        if trainer.is_global_zero:
            for older in self.run.checkpoints.glob("*.ckpt"):
                if older != path:
                    remove_checkpoint(older)
