"""DeepSpeed without Lightning: its device, process group, configuration and requirements.

Works on CUDA and, with gloo, on CPU, so that a recipe can be tried without a GPU.
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError
from ..recipe.files import merged
from ..recipe.schema import TrainerRecipe

# Keys of DeepSpeed's JSON that the recipe sets, with the recipe's key.
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
    "zero_allow_untested_optimizer": "nothing: Laconic uses torch's AdamW",
    "zero_force_ds_cpu_optimizer": "nothing: Laconic uses torch's AdamW, also with offload",
}
_OFFLOAD = {"optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
# Longer than DeepSpeed takes to compile any of its parts.
_BUILD_SECONDS = 1200


def stage_of(settings: TrainerRecipe) -> int:
    """ZeRO stage of resolved settings; 0 for a plain strategy."""
    return int(settings.strategy.removeprefix("deepspeed_")) if settings.strategy.startswith("deepspeed") else 0


def set_accelerator() -> None:
    """Sets DeepSpeed's device: otherwise it guesses the device when it is imported, and prints a warning to stdout."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def join_deepspeed() -> None:
    """Makes DeepSpeed use the existing process group; otherwise it would search for MPI."""
    set_accelerator()
    import deepspeed

    # DeepSpeed warns about a scorer's output, a dataclass. Its hooks are on the outputs of the scorer's layers, which are tensors.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
    with contextlib.redirect_stdout(io.StringIO()), told_of_builds():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)


def check_deepspeed(settings: TrainerRecipe, batch_size: int) -> None:
    """Checks the requirements of a deepspeed strategy. Raises RecipeError with one clear message.

    Args:
        settings: resolved settings with a deepspeed strategy.
        batch_size: images per step and process.
    """
    deepspeed_config(settings, batch_size)
    _check_compiler()
    _check_builds()


def _check_compiler() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "trainer.strategy = deepspeed_*: the package deepspeed is not installed; pip install deepspeed, or set trainer.strategy=plain"
        )
    if torch.cuda.is_available() or sys.platform != "linux":
        return
    # On a CPU DeepSpeed compiles its shared-memory communication at first use.
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if "ninja" in missing and importlib.util.find_spec("ninja") is not None:
        missing.remove("ninja")
    if missing:
        raise RecipeError(
            f"trainer.strategy = deepspeed_*: DeepSpeed compiles an extension on a CPU, and {' and '.join(missing)} cannot be found: "
            "install a C++ compiler (g++) and ninja, set CXX, or set trainer.strategy=plain"
        )


def _check_builds() -> None:
    """Raises RecipeError if a build of a DeepSpeed extension was killed: torch would wait for its lock file for ever, without a message."""
    for lock, age in _locks():
        if age > _BUILD_SECONDS:
            raise RecipeError(
                f"{lock} is {age / 60:.0f} minutes old: compiling a DeepSpeed extension was interrupted, and every run would wait for this "
                "lock for ever; delete the file and start again"
            )


def _locks() -> list[tuple[Path, float]]:
    """Lock files of DeepSpeed extensions that are being compiled, and their ages in seconds."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    found = []
    for lock in root.glob("**/deepspeed_*/lock"):
        with contextlib.suppress(FileNotFoundError):
            found.append((lock, time.time() - lock.stat().st_mtime))
    return found


@contextlib.contextmanager
def told_of_builds(patience: float = 15.0) -> Iterator[None]:
    """Context that may compile a DeepSpeed extension. After ``patience`` seconds, and ever less often, rank 0 says which lock is waited for:
    a compile that was killed leaves one, and torch waits for it for ever."""
    done = threading.Event()

    def tell() -> None:
        wait = patience
        while not done.wait(wait):
            for lock, age in _locks():
                sys.stderr.write(
                    f"a DeepSpeed extension is being compiled since {age:.0f} s; if no process does that, a killed one left its lock: "
                    f"delete {lock}\n"
                )
            wait *= 2

    teller = threading.Thread(target=tell, daemon=True)
    if os.environ.get("RANK", "0") == "0":
        teller.start()
    try:
        yield
    finally:
        done.set()
        if teller.is_alive():
            teller.join()


def deepspeed_config(settings: TrainerRecipe, batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: Laconic's own, merged with the user's.

    Args:
        settings: resolved settings with a deepspeed strategy.
        batch_size: images per step and process.

    Raises:
        RecipeError: the user's configuration is invalid, or sets a key that the recipe sets.
    """
    cuda = torch.cuda.is_available()
    bucket = 200_000_000 if cuda else 5_000_000
    zero: dict[str, Any] = {
        "stage": stage_of(settings),
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # If True, DeepSpeed replaces torch.nn.functional.linear in the whole process, also for control arms and measurements.
        "memory_efficient_linear": False,
    }
    for key in _OFFLOAD.get(settings.offload, ()):
        zero[key] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        # torch's AdamW under every strategy, so that training does not depend on the strategy.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": batch_size,
        # Lightning sets the clipping of the engine; zero.Init reads this configuration earlier.
        "gradient_clipping": settings.clip,
    }
    if settings.precision == "bf16":
        # As everywhere in Laconic, weights stay in float32 and autocast computes in bf16; DeepSpeed's own bf16 would cast the weights.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    user = _user_config(settings)
    _refuse_recipe_keys(user, settings)
    whole = merged(config, user)
    _check_zero(whole["zero_optimization"])
    return whole


def _user_config(settings: TrainerRecipe) -> dict[str, Any]:
    given = settings.deepspeed
    if not isinstance(given, str):
        return given or {}
    path = Path(given)
    if not os.path.isfile(path):
        raise RecipeError(f"trainer.deepspeed = {given!r} does not exist: set it to the path of a DeepSpeed JSON, or to its content")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"trainer.deepspeed = {given!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"trainer.deepspeed = {given!r} must be a JSON object, and is {type(content).__name__}")
    return content


def _refuse_recipe_keys(user: dict[str, Any], settings: TrainerRecipe) -> None:
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f"trainer.deepspeed: zero_optimization = {zero!r} must be an object")
    for key, instead in _OF_RECIPE.items():
        block, _, inner = key.rpartition(".")
        if inner in (zero if block else user):
            cure = f"remove it; {instead.partition(': ')[2]}" if instead.startswith("nothing") else f"set {instead} instead"
            raise RecipeError(f"trainer.deepspeed sets {key}, which the recipe sets: {cure}")
    stage = zero.get("stage", stage_of(settings))
    if stage != stage_of(settings):
        raise RecipeError(
            f"trainer.deepspeed sets zero_optimization.stage = {stage}, and trainer.strategy is {settings.strategy}: remove the stage, "
            f"or set trainer.strategy=deepspeed_{stage}"
        )
    for key in _OFFLOAD.get(settings.offload, ()):
        block = zero.get(key) or {}
        if not isinstance(block, dict):
            raise RecipeError(f"trainer.deepspeed: zero_optimization.{key} = {block!r} must be an object")
        device = block.get("device", "cpu")
        if device != "cpu":
            raise RecipeError(
                f"trainer.deepspeed sets zero_optimization.{key}.device = {device!r}, and trainer.offload = {settings.offload!r} means the "
                "CPU: remove one of them"
            )


def _check_zero(zero: dict[str, Any]) -> None:
    """Runs DeepSpeed's own check of the block before training."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    from pydantic import ValidationError

    set_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    unknown = [key for key in zero if key not in _zero_keys(DeepSpeedZeroConfig)]
    if unknown:
        raise RecipeError(f"trainer.deepspeed: zero_optimization.{unknown[0]} is not a key of DeepSpeed")
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, ValueError) as error:
        raise RecipeError(f"trainer.deepspeed: zero_optimization: {' '.join(str(error).split())}") from None


def _zero_keys(config: Any) -> set[str]:
    return set(config.model_fields) | {field.alias for field in config.model_fields.values() if field.alias}
