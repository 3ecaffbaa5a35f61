"""Resuming from a checkpoint: finds it and checks that it belongs to the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...modules.checkpoints.training_checkpoint import damage
from ...modules.checkpoints.whole_files import DamagedFile, compare
from ..errors import RecipeError
from ..recipe.files import dump
from ..recipe.plain_yaml import parsed, read_file
from ..recipe.schema import Recipe
from ..run_folder import RunFolder

# Last file written into DeepSpeed's checkpoint folders; Lightning's single files are written atomically.
MARKER = "complete.json"
_OUTPUT = ("log_every", "validate_every", "checkpoint_every", "loggers", "pictures", "bench_rounds")
# Keys that may differ in a run that goes on; the number of processes per machine may, their number in all not.
FREE = ("output", "baselines", *(f"trainer.{key}" for key in (*_OUTPUT, "devices", "num_nodes")))


def find_checkpoint(run: RunFolder, resume: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and why newer ones were passed over.

    Args:
        run: folder of the run.
        resume: path of a checkpoint, a file or a DeepSpeed folder; ``auto`` finds the newest whole one of the run; None finds none.

    A run that ended while its first checkpoint was written has none: it starts anew.

    Raises:
        RecipeError: a named checkpoint does not exist or is damaged, or none of the run's checkpoints is whole.
    """
    if resume is None:
        return None, []
    if resume != "auto":
        path = Path(resume)
        if not path.exists():
            raise RecipeError(f"--resume {resume}: there is no such checkpoint; use auto, or a .ckpt of a run's checkpoints folder")
        if (fault := fault_of(path)) is not None:
            raise RecipeError(f"--resume {resume}: {fault}; use auto, or another .ckpt of a run's checkpoints folder")
        return path, []
    passed: list[str] = []
    found = sorted(run.checkpoints.glob("*.ckpt"), key=_step, reverse=True)
    for path in found:
        if (fault := fault_of(path)) is None:
            return path, passed
        passed.append(fault)
    if passed and not (len(found) == 1 and found[0].is_dir() and not (found[0] / MARKER).is_file()):
        raise RecipeError(f"--resume auto: {run.path} has no whole checkpoint: {'; '.join(passed)}; start again with --overwrite")
    return None, passed


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it is whole. Reads all of it."""
    if checkpoint.is_file():
        return damage(checkpoint)
    if not (checkpoint / MARKER).is_file():
        return f"{checkpoint} is not complete, it has no {MARKER}: writing was interrupted, or it is another folder"
    try:
        compare(checkpoint, json.loads((checkpoint / MARKER).read_text("utf-8"))["files"], MARKER)
    except DamagedFile as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / MARKER} is damaged"
    return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; a folder loses its marker first, so that it is never taken for a whole one."""
    if checkpoint.is_dir():
        (checkpoint / MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()


def check_same_processes(checkpoint: Path, world_size: int, stage: int) -> None:
    """Raises RecipeError if a checkpoint does not fit the number of processes or the strategy.

    Args:
        checkpoint: a file or folder.
        world_size: current number of processes.
        stage: current ZeRO stage, 0 for a plain strategy.
    """
    if checkpoint.is_dir() != bool(stage):
        kinds = ("a DeepSpeed folder" if checkpoint.is_dir() else "a single file", f"deepspeed_{stage}" if stage else "plain")
        raise RecipeError(f"cannot resume {checkpoint}: it is {kinds[0]}, and trainer.strategy is {kinds[1]}; use the strategy of that run")
    if not checkpoint.is_dir():
        return
    written = json.loads((checkpoint / MARKER).read_text())
    if written["world_size"] != world_size:
        raise RecipeError(_other_world(checkpoint, written["world_size"], world_size))
    if written["stage"] != stage:
        raise RecipeError(
            f"cannot resume {checkpoint}: it was written by deepspeed_{written['stage']}, now it is deepspeed_{stage}; set "
            f"trainer.strategy=deepspeed_{written['stage']}"
        )


def _other_world(what: Path, before: int, now: int) -> str:
    weights = what if what.suffix == ".ckpt" else find_checkpoint(RunFolder(what), "auto")[0] or what
    return (
        f"cannot resume {what}: it was trained by {before} process(es), now there are {now}; set trainer.devices and trainer.num_nodes "
        f"to a product of {before}, or start from its weights with a new optimizer: model.name={weights} and another output"
    )


def _step(checkpoint: Path) -> tuple[int, str]:
    """Checkpoints are named by their step; other names are older than any step."""
    name = checkpoint.stem
    return (int(name), name) if name.isdecimal() else (-1, name)


def check_same_run(run: RunFolder, recipe: Recipe) -> None:
    """Raises RecipeError if the recipe differs from that of the run to resume."""
    if not run.recipe.is_file():
        return
    before, now = read_file(run.recipe), parsed(dump(recipe), "the recipe")
    if not isinstance(before, dict) or not isinstance(before.get("trainer"), dict):
        raise RecipeError(f"cannot resume {run.path}: its {run.recipe.name} is damaged; restore it, or start again with --overwrite")
    worlds = [_world(settings) for settings in (before["trainer"], now["trainer"])]
    if worlds[0] != worlds[1]:
        raise RecipeError(_other_world(run.path, *worlds))
    for key, old, new in differences(before, now):
        if not any(key == name or key.startswith(f"{name}.") for name in FREE):
            raise RecipeError(
                f"cannot resume {run.path}: {key} was {old!r} and is now {new!r}; use the same overrides, or another output folder"
            )


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each innermost key whose value differs, with both values; a list of another length is one value."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(items)) for items in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name, value in now.items():
            yield from differences(before.get(name), value, f"{key}.{name}" if key else str(name))
    elif before != now:
        yield key, before, now


def _world(settings: dict[str, Any]) -> int:
    """Number of processes of a recorded trainer block, in which ``auto`` is resolved."""
    return int(settings.get("devices", 1)) * int(settings.get("num_nodes", 1))
