"""Going on from a checkpoint: which one, and whether it is of the same run."""

from __future__ import annotations

from pathlib import Path

import yaml

from .recipe import Recipe
from .recipe_files import RecipeError, dump


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from. Raises RecipeError where a named one does not exist."""
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        if not path.is_file():
            raise RecipeError(f"--resume {resume}: there is no such checkpoint; give auto, or a .ckpt file of a run's checkpoints folder")
        return path
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def check_same_run(folder: Path, recipe: Recipe) -> None:
    """Raises RecipeError where resuming would go on with another recipe than the checkpoint's."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    before, now = yaml.safe_load(path.read_text()), yaml.safe_load(dump(recipe))
    free = {"output", "baselines"} | {
        f"trainer.{key}" for key in ("log_every", "validate_every", "checkpoint_every", "pictures", "bench_rounds")
    }
    for block, value in now.items():
        pairs = {f"{block}.{key}": (before.get(block, {}).get(key), item) for key, item in value.items()} if block == "trainer" else {}
        for key, (old, new) in (pairs or {block: (before.get(block), value)}).items():
            if key not in free and old != new:
                raise RecipeError(
                    f"cannot resume {folder}: {key} was {old!r} and is now {new!r}; give the same overrides, or another output to start anew"
                )
