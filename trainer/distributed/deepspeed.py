"""DeepSpeed without Lightning: its device, its process group, its configuration, and what it needs of a machine.

On CUDA and, with gloo, on CPU, so that a recipe can be tried where there is no GPU.
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

from ..errors import RecipeError
from ..recipe.files import merged
from ..recipe.schema import TrainerRecipe

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
# No part of DeepSpeed takes so long to compile.
_BUILD_SECONDS = 1200


def stage_of(settings: TrainerRecipe) -> int:
    """ZeRO's stage, 0 for a plain strategy; of settings that were resolved."""
    return int(settings.strategy.removeprefix("deepspeed_")) if settings.strategy.startswith("deepspeed") else 0


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


def check_deepspeed(settings: TrainerRecipe, batch_size: int) -> None:
    """What a deepspeed strategy needs. Raises RecipeError with one clear message.

    Args:
        settings: resolved, with a deepspeed strategy.
        batch_size: images a step and process.
    """
    deepspeed_config(settings, batch_size)
    _check_compiler()
    _check_builds()


def _check_compiler() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "trainer.strategy = deepspeed_*: the package deepspeed is not installed; pip install deepspeed, or strategy=plain"
        )
    if torch.cuda.is_available() or sys.platform != "linux":
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
    whole = merged(config, user)
    _check_zero(whole["zero_optimization"])
    return whole


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
