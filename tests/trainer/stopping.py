"""A run that stops early, as by SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from laconic.trainer.distributed.signals import Stopped, StopSignals
from laconic.trainer.recipe.files import LoadedRecipe
from laconic.trainer.run import train_arm


class StopAfter(StopSignals):
    """As if SIGTERM came during an optimizer step.

    Args:
        step: the step, counted from the start or resumption of the training.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.asked = step, 0

    @property
    def received(self) -> int | None:
        """Asked once a step, and once a batch of a validation."""
        self.asked += 1
        return signal.SIGTERM if self.asked >= self.step else None

    @received.setter
    def received(self, value: Any) -> None:
        pass


def train_until(step: int, loaded: LoadedRecipe, folder: Path, console: Console, resume: str | None = None) -> None:
    """Trains until SIGTERM comes in a step, counted from the start or resumption."""
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; the last checkpoint is .*\.ckpt: .*--resume auto"):
        train_arm(loaded, "arm", folder, console, resume=resume, signals=StopAfter(step))
    assert len(list((folder / "checkpoints").iterdir())) == 1
