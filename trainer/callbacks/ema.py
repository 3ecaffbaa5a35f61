"""Exponential moving average of the weights, routers included."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightEma(WeightAveraging):
    """Averages after every optimizer step. Validation, test and the saved model use the average; checkpoints hold both.

    The average starts as the weights after the first step. This callback must come before callbacks that save checkpoints.

    Args:
        decay: decay of the average per step: average ← decay · average + (1 − decay) · weights.
    """

    def __init__(self, decay: float) -> None:
        # Buffers are copied: an average of counters has no meaning.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        from lightning.pytorch.strategies import DeepSpeedStrategy

        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"trainer.ema = {self.decay} is not supported with DeepSpeed, which keeps and saves its own copy of the weights: "
                "set trainer.ema=null or trainer.strategy=plain"
            )
        super().setup(trainer, pl_module, stage)
