"""Histograms of scores and pictures of kept tokens for TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from ..show.pictures import overlays


class RoutingPictures(Callback):
    """At every validation: a histogram of each stage's scores, and images with dropped patches darkened.

    Args:
        number: number of images.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        trace = outputs["trace"]
        logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        if batch_idx or trace is None or not trainer.is_global_zero or trainer.sanity_checking or logger is None:
            return
        writer, step = logger.experiment, trainer.global_step
        for name, routing in trace.routings.items():
            scores = torch.masked_select(routing.scores, routing.routable).float()
            if routing.routed and len(scores) and bool(torch.isfinite(scores).all()):
                # TensorBoard raises for a histogram of nothing, where no token may be dropped, and of NaN.
                writer.add_histogram(f"{name}/scores", scores, step)
        if self.number and trace.flow().pixel_values is not None:
            writer.add_images("kept_tokens", overlays(trace, self.number), step, dataformats="NHWC")
