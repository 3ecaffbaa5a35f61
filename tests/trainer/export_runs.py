"""Run folders as training leaves them, written without training; and a machine without Laconic."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

from transformers import PreTrainedModel

from laconic.trainer.measure.report import write_json
from laconic.trainer.recipe.files import dump, load

# What a program that runs there begins with.
WITHOUT_LACONIC = """
import os, sys
try:
    import laconic
except ImportError:
    pass
else:
    raise SystemExit("Laconic is here")
import torch
from safetensors.torch import load_file, save_file
"""
FIGURES = {
    "quality": {"metric": "accuracy", "split": "test", "dense": 0.9, "compressed": 0.8765},
    "keep": {"requested": {"before_1": 0.5}, "achieved": {"before_1": 0.4953}},
    "macs_ratio": 0.512,
    "step_time": {"speedup": 1.87},
    "versions": {"cores": "2"},
    "export": {"format": None},
}


def written_run(folder: Path, model: PreTrainedModel, recipe: str = "vit_digits", *overrides: str) -> Path:
    """A run folder that holds a model.

    Args:
        folder: to write.
        model: dense or compressed.
        recipe: that it was trained with; what it says of the model need not be true.
        overrides: of the recipe.
    """
    model.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(dump(load(recipe, [*overrides, f"output={folder}"]).recipe))
    write_json(folder / "report.json", FIGURES)
    return folder


def machine_without_laconic(folder: Path) -> Path:
    """The Python of a new environment that has every installed package but Laconic."""
    venv.create(folder)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    ).stdout.strip()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        # Neither the package nor the files by which an editable install makes itself found.
        if "laconic" not in path.name.lower() and path.suffix != ".pth":
            (Path(site) / path.name).exists() or (Path(site) / path.name).symlink_to(path)
    return python
