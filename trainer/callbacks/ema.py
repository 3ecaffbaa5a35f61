"""Exponential moving average of the weights, routers included."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightEma(WeightAveraging):
    """Averages after every optimizer step; validation, test and the saved model use the average, checkpoints hold both.

    The average starts as the weights after the first step. Must come before callbacks that save a checkpoint at the end of a batch.

    Args:
        decay: of the average a step: average ← decay · average + (1 − decay) · weights.
    """

    def __init__(self, decay: float) -> None:
        # Buffers are copied, not averaged: a mean of counters means nothing.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        from lightning.pytorch.strategies import DeepSpeedStrategy

        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"trainer.ema = {self.decay} does not go with DeepSpeed, which keeps and saves weights of its own: "
                "set trainer.ema=null or trainer.strategy=plain"
            )
        super().setup(trainer, pl_module, stage)
