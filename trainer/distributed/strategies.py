"""Which processes train a recipe and what they share: from ``trainer.strategy`` and its neighbours to Lightning's strategy.

``plain`` is one process, or DDP. ``deepspeed_1``, ``_2`` and ``_3`` partition optimizer states, gradients and parameters; they run
on CUDA and, with gloo, on CPU, so that a recipe can be tried where there is no GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed

from ..errors import RecipeError
from ..recipe.schema import Recipe, TrainerRecipe
from .processes import check_environment, local_processes

# Keys of DeepSpeed's JSON that the recipe has a key for, with that key.
_OF_RECIPE = {
    "train_batch_size": "data.batch_size (images a step and process)",
    "train_micro_batch_size_per_gpu": "data.batch_size (images a step and process)",
    "gradient_accumulation_steps": "trainer.accumulate",
    "gradient_clipping": "trainer.clip",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "data_types": "trainer.precision",
    "optimizer": "the optimizer block",
    "scheduler": "optimizer.schedule, optimizer.warmup and optimizer.final",
    "activation_checkpointing": "trainer.gradient_checkpointing",
    "zero_optimization.compute_grad_norm": "nothing: the guard against NaN reads the norm",
    "zero_allow_untested_optimizer": "nothing: Laconic brings torch's AdamW",
    "zero_force_ds_cpu_optimizer": "nothing: Laconic brings torch's AdamW, offloaded too",
}
_OFFLOAD = {"optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}


def stage_of(settings: TrainerRecipe) -> int:
    """ZeRO's stage, 0 for a plain strategy; of settings that were resolved."""
    return int(settings.strategy.removeprefix("deepspeed_")) if settings.strategy.startswith("deepspeed") else 0


def processes_of(settings: TrainerRecipe) -> int:
    """Processes of the run."""
    return _devices(settings) * settings.num_nodes


def _devices(settings: TrainerRecipe) -> int:
    if settings.devices != "auto":
        return settings.devices
    started = local_processes()
    if started is not None:
        return started
    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with ``auto`` filled in, which is what a run folder records and resuming compares."""
    settings = recipe.trainer
    strategy = settings.strategy
    if strategy == "auto":
        strategy = "deepspeed_2" if processes_of(settings) > 1 else "plain"
    return recipe.model_copy(update={"trainer": settings.model_copy(update={"strategy": strategy, "devices": _devices(settings)})})


# No part of DeepSpeed takes so long to compile.
_BUILD_SECONDS = 1200


def check(recipe: Recipe) -> None:
    """What the strategy needs and this machine can tell. Raises RecipeError with one clear message."""
    settings = resolved(recipe).trainer
    assert isinstance(settings.devices, int)
    stage, cuda = stage_of(settings), torch.cuda.is_available()
    if not stage and settings.offload != "none":
        raise RecipeError(f"trainer.offload = {settings.offload!r} is DeepSpeed's: give trainer.strategy=deepspeed_2, or offload=none")
    if not stage and settings.deepspeed is not None:
        raise RecipeError("trainer.deepspeed is set but trainer.strategy is plain: give trainer.strategy=deepspeed_1, _2 or _3")
    if settings.offload == "all" and stage != 3:
        raise RecipeError(
            f"trainer.offload = 'all' keeps parameters in CPU memory, which {settings.strategy} does not partition: "
            "give trainer.strategy=deepspeed_3, or trainer.offload=optimizer"
        )
    if cuda and settings.devices > torch.cuda.device_count():
        raise RecipeError(
            f"trainer.devices = {settings.devices}, and this machine has {torch.cuda.device_count()} CUDA devices: give at most so many, "
            "or auto"
        )
    if stage == 3 and settings.compile:
        raise RecipeError(
            "trainer.compile = true does not go with deepspeed_3, which gathers parameters layer by layer: give trainer.compile=false, "
            "or trainer.strategy=deepspeed_2"
        )
    if stage and settings.ema is not None:
        raise RecipeError(
            f"trainer.ema = {settings.ema} does not go with {settings.strategy}, which keeps weights of its own: "
            "give trainer.ema=null, or trainer.strategy=plain"
        )
    if stage == 3 and recipe.distillation is not None:
        raise RecipeError(
            "distillation does not go with deepspeed_3, which would partition the teacher too: leave distillation out, "
            "or give trainer.strategy=deepspeed_2"
        )
    if stage:
        deepspeed_config(settings, recipe.data.batch_size)
        _check_deepspeed(cuda)
        _check_builds()
    if stage or processes_of(settings) > 1:
        _check_communication(cuda)
        check_environment(settings.devices, settings.num_nodes)


def _check_builds() -> None:
    """Raises RecipeError where a build of DeepSpeed's parts was killed: torch would wait for its lock for ever, and say nothing."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_*/lock"):
        age = time.time() - lock.stat().st_mtime
        if age > _BUILD_SECONDS:
            raise RecipeError(
                f"{lock} is {age / 60:.0f} minutes old: compiling a part of DeepSpeed was interrupted, and every run would wait for it for "
                "ever; delete that file and start again"
            )


def _check_deepspeed(cuda: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "trainer.strategy = deepspeed_*: the package deepspeed is not installed; pip install deepspeed, or strategy=plain"
        )
    if cuda or sys.platform != "linux":
        return
    # On a CPU DeepSpeed compiles its exchange through shared memory when it is first used.
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if "ninja" in missing and importlib.util.find_spec("ninja") is not None:
        missing.remove("ninja")
    if missing:
        raise RecipeError(
            f"trainer.strategy = deepspeed_*: DeepSpeed compiles a part of itself on a CPU and {' and '.join(missing)} cannot be found: "
            "install a C++ compiler (g++) and ninja, set CXX, or give trainer.strategy=plain"
        )


def _check_communication(cuda: bool) -> None:
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise RecipeError("several processes need torch.distributed with gloo, which this build of torch lacks: give trainer.devices=1")
    if cuda and not distributed.is_nccl_available():
        raise RecipeError("several CUDA devices need NCCL, which this build of torch lacks: give trainer.devices=1 trainer.strategy=plain")


def deepspeed_config(settings: TrainerRecipe, batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: Laconic's own, with the user's laid over it.

    Args:
        settings: resolved, with a deepspeed strategy.
        batch_size: images a step and process.

    Raises:
        RecipeError: the user's sets what the recipe sets, or is none.
    """
    cuda = torch.cuda.is_available()
    bucket = 200_000_000 if cuda else 5_000_000
    zero: dict[str, Any] = {
        "stage": stage_of(settings),
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # DeepSpeed would replace torch.nn.functional.linear for the whole process, control arms and measurements included.
        "memory_efficient_linear": False,
    }
    for key in _OFFLOAD.get(settings.offload, ()):
        zero[key] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        # torch's AdamW under every strategy, so that a strategy does not change what is learned.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": batch_size,
        # Lightning sets the engine's; zero.Init reads the same configuration earlier.
        "gradient_clipping": settings.clip,
    }
    if settings.precision == "bf16":
        # As everywhere in Laconic: weights stay in float32 and autocast computes. DeepSpeed's own bf16 would cast the weights.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    user = _users(settings)
    _refuse_recipe_keys(user, settings)
    merged = _merged(config, user)
    _check_zero(merged["zero_optimization"])
    return merged


def _users(settings: TrainerRecipe) -> dict[str, Any]:
    given = settings.deepspeed
    if not isinstance(given, str):
        return given or {}
    path = Path(given)
    if not path.is_file():
        raise RecipeError(f"trainer.deepspeed = {given!r} does not exist: give the path of a DeepSpeed JSON, or its content")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecipeError(f"trainer.deepspeed = {given!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"trainer.deepspeed = {given!r} must hold an object, it holds {type(content).__name__}")
    return content


def _refuse_recipe_keys(user: dict[str, Any], settings: TrainerRecipe) -> None:
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f"trainer.deepspeed: zero_optimization = {zero!r} must be an object")
    for key, instead in _OF_RECIPE.items():
        block, _, inner = key.rpartition(".")
        if inner in (zero if block else user):
            cure = f"leave it out; {instead.partition(': ')[2]}" if instead.startswith("nothing") else f"give {instead} instead"
            raise RecipeError(f"trainer.deepspeed sets {key}, which the recipe decides: {cure}")
    stage = zero.get("stage", stage_of(settings))
    if stage != stage_of(settings):
        raise RecipeError(
            f"trainer.deepspeed sets zero_optimization.stage = {stage}, and trainer.strategy is {settings.strategy}: leave the stage out, "
            f"or give trainer.strategy=deepspeed_{stage}"
        )
    for key in _OFFLOAD.get(settings.offload, ()):
        device = (zero.get(key) or {}).get("device", "cpu")
        if device != "cpu":
            raise RecipeError(
                f"trainer.deepspeed sets zero_optimization.{key}.device = {device!r}, and trainer.offload = {settings.offload!r} means the "
                "CPU: leave one of them out"
            )


def _check_zero(zero: dict[str, Any]) -> None:
    """DeepSpeed's own check of the block, before training instead of in the middle of starting it."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    from pydantic import ValidationError

    set_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    unknown = [key for key in zero if key not in _zero_keys(DeepSpeedZeroConfig)]
    if unknown:
        raise RecipeError(f"trainer.deepspeed: zero_optimization.{unknown[0]} is no key of DeepSpeed's")
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, ValueError) as error:
        raise RecipeError(f"trainer.deepspeed: zero_optimization: {' '.join(str(error).split())}") from None


def _zero_keys(config: Any) -> set[str]:
    return set(config.model_fields) | {field.alias for field in config.model_fields.values() if field.alias}


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def set_accelerator() -> None:
    """DeepSpeed guesses its device, with a warning on stdout, as soon as anything imports it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def join_deepspeed() -> None:
    """Makes DeepSpeed use the process group that is up. Without this it would look for MPI, and say so."""
    set_accelerator()
    import deepspeed

    # Beside what a scorer returns, a dataclass, there are the outputs of its layers, which are tensors: those have the hooks.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)


def needs_group(settings: TrainerRecipe) -> bool:
    """Whether the strategy talks through a process group even with one process."""
    return stage_of(settings) > 0


def lightning_strategy(recipe: Recipe, unused_parameters: bool) -> Strategy | str:
    """Lightning's strategy for a resolved recipe.

    Args:
        recipe: with ``auto`` filled in.
        unused_parameters: whether a step leaves parameters without gradient, which DDP must be told, and pays for.
    """
    settings = recipe.trainer
    if stage_of(settings):
        set_accelerator()
        from .deepspeed import LaconicDeepSpeed

        frozen = recipe.lora is not None and recipe.lora.freezes
        return LaconicDeepSpeed(deepspeed_config(settings, recipe.data.batch_size), frozen)
    if processes_of(settings) > 1:
        return DDPStrategy(find_unused_parameters=unused_parameters)
    return "auto"
