"""Lightning's strategy and the processes of a recipe, from ``trainer.strategy``, ``devices``, ``num_nodes`` and ``deepspeed``.

``plain`` is one process, or DDP. ``deepspeed_1``, ``_2`` and ``_3`` partition optimizer states, gradients and parameters.
"""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed

from ..errors import RecipeError
from ..recipe.schema import ITSELF, Recipe, TrainerRecipe
from .deepspeed import check_deepspeed, deepspeed_config, stage_of
from .deepspeed_strategy import LaconicDeepSpeed
from .processes import check_environment, local_processes


def processes_of(settings: TrainerRecipe) -> int:
    """Number of processes of the run."""
    return _devices(settings) * settings.num_nodes


def _devices(settings: TrainerRecipe) -> int:
    if settings.devices != "auto":
        return settings.devices
    started = local_processes()
    if started is not None:
        return started
    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with ``auto`` resolved, as a run folder records it and resuming compares it."""
    settings = recipe.trainer
    strategy = settings.strategy
    if strategy == "auto":
        strategy = "deepspeed_2" if processes_of(settings) > 1 else "plain"
    return recipe.model_copy(update={"trainer": settings.model_copy(update={"strategy": strategy, "devices": _devices(settings)})})


def check(recipe: Recipe) -> None:
    """Checks the requirements of the strategy on this machine. Raises RecipeError with one clear message."""
    settings = resolved(recipe).trainer
    assert isinstance(settings.devices, int)
    stage, cuda = stage_of(settings), torch.cuda.is_available()
    if not stage and settings.offload != "none":
        raise RecipeError(f"trainer.offload = {settings.offload!r} needs DeepSpeed: set trainer.strategy=deepspeed_2, or offload=none")
    if not stage and settings.deepspeed is not None:
        raise RecipeError("trainer.deepspeed is set but trainer.strategy is plain: set trainer.strategy=deepspeed_1, _2 or _3")
    if settings.offload == "all" and stage != 3:
        raise RecipeError(
            f"trainer.offload = 'all' keeps parameters in CPU memory, which {settings.strategy} does not partition: "
            "set trainer.strategy=deepspeed_3, or trainer.offload=optimizer"
        )
    if cuda and settings.devices > torch.cuda.device_count():
        raise RecipeError(
            f"trainer.devices = {settings.devices}, and this machine has {torch.cuda.device_count()} CUDA devices: set at most this "
            "number, or auto"
        )
    if stage == 3 and settings.compile:
        raise RecipeError(
            "trainer.compile = true is not supported with deepspeed_3, which gathers parameters layer by layer: set trainer.compile=false, "
            "or trainer.strategy=deepspeed_2"
        )
    if stage and settings.ema is not None:
        raise RecipeError(
            f"trainer.ema = {settings.ema} is not supported with {settings.strategy}, which keeps its own copy of the weights: "
            "set trainer.ema=null, or trainer.strategy=plain"
        )
    if stage == 3 and recipe.distillation is not None and recipe.distillation.teacher != ITSELF:
        raise RecipeError(
            "distillation is not supported with deepspeed_3, which would partition the teacher too: remove distillation, "
            "or set trainer.strategy=deepspeed_2"
        )
    if stage:
        check_deepspeed(settings, recipe.data.batch_size)
    if stage or processes_of(settings) > 1:
        _check_communication(cuda)
        check_environment(settings.devices, settings.num_nodes)


def _check_communication(cuda: bool) -> None:
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise RecipeError("several processes need torch.distributed with gloo, which this build of torch lacks: set trainer.devices=1")
    if cuda and not distributed.is_nccl_available():
        raise RecipeError("several CUDA devices need NCCL, which this build of torch lacks: set trainer.devices=1 trainer.strategy=plain")


def needs_group(settings: TrainerRecipe) -> bool:
    """True if the strategy needs a process group even with one process."""
    return stage_of(settings) > 0


def lightning_strategy(recipe: Recipe, unused_parameters: bool) -> Strategy | str:
    """Lightning's strategy for a resolved recipe.

    Args:
        recipe: recipe with ``auto`` resolved.
        unused_parameters: True if some parameters have no gradient in a step; DDP then has to search for them, which costs time.
    """
    settings = recipe.trainer
    if stage_of(settings):
        frozen = recipe.lora is not None and recipe.lora.freezes
        return LaconicDeepSpeed(deepspeed_config(settings, recipe.data.batch_size), frozen)
    if processes_of(settings) > 1:
        return DDPStrategy(find_unused_parameters=unused_parameters)
    return "auto"
