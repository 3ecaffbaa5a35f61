"""Makes the Lightning Trainer of a recipe."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from transformers.utils.logging import disable_progress_bar

from ..callbacks.ema import WeightEma
from ..callbacks.tensorboard import RoutingPictures
from ..distributed.checkpoint_files import WholeCheckpoints
from ..distributed.deepspeed import set_accelerator, stage_of
from ..distributed.processes import environment
from ..distributed.strategies import lightning_strategy, needs_group, processes_of
from ..recipe.schema import Recipe
from ..run_folder import RunFolder
from ..trackers.loggers import start_loggers


def lightning_trainer(
    recipe: Recipe, run: RunFolder, steps: int, callbacks: Sequence[Callback], unused_parameters: bool = False
) -> lightning.Trainer:
    """The Lightning Trainer of a recipe.

    Args:
        recipe: resolved recipe.
        run: folder of checkpoints and curves.
        steps: optimizer steps.
        callbacks: callbacks in addition to those for averaging and pictures.
        unused_parameters: True if some parameters have no gradient in a step.
    """
    settings = recipe.trainer
    # DeepSpeed has its own autocast configuration; Lightning's precision would also cast the weights.
    precision = "32-true" if settings.precision == "fp32" or stage_of(settings) else "bf16-mixed"
    several = processes_of(settings) > 1 or needs_group(settings)
    # First, so that a checkpoint at the end of a batch includes that batch in the average.
    averaged = [WeightEma(settings.ema)] if settings.ema is not None else []
    # DeepSpeed writes folders itself.
    plugins: list[Any] = [
        *([environment(processes_of(settings))] if several else []),
        *([] if stage_of(settings) else [WholeCheckpoints()]),
    ]
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=("cuda" if torch.cuda.is_available() else "cpu") if several else "auto",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=lightning_strategy(recipe, unused_parameters),
        plugins=plugins,
        precision=precision,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip or None,
        val_check_interval=(settings.validate_every * settings.accumulate) if settings.validate_every else None,
        check_val_every_n_epoch=None if settings.validate_every else 1,
        num_sanity_val_steps=0,
        logger=start_loggers(recipe, run),
        log_every_n_steps=settings.log_every,
        callbacks=[*averaged, *callbacks, RoutingPictures(settings.pictures)],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's own handler of SIGTERM ends the process with exit code 0, and calls a collective inside the handler; see signals.py.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def quiet() -> None:
    """Suppresses informational messages of libraries; real warnings are still shown."""
    set_accelerator()
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*When saving the DeepSpeed Stage 3 checkpoint.*")
    # Logged values are equal on all ranks already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
