"""Run folders as training leaves them, written without training; and a machine without Laconic."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import torch

from laconic.trainer.build import build
from laconic.trainer.recipe_files import dump, load
from laconic.trainer.report import write_json
from tests.matrix import settle
from tests.trainer.conftest import QUICK

# Found by the budget in QUICK's two layers; written out, so that a test says what it tests.
STAGE = "compression.stages=[{layer: 0, scorer: {name: evidence, reads: pixels}, keep: 0.5}]"


def written_run(folder: Path, recipe: str, *overrides: str) -> Path:
    """A run folder with a fresh model whose scores and answers differ from token to token."""
    loaded = load(recipe, [*QUICK, f"output={folder}", "baselines=[]", *overrides])
    parts = build(loaded.recipe)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if parameter.ndim > 1 and (".stages." in name or "classifier" in name or "embeddings" in name):
                parameter.normal_(0, 0.5)
        settle(parts.model)
    parts.model.eval().save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(dump(loaded.recipe))
    figures = {
        "quality": {"metric": "accuracy", "split": "test", "dense": 0.9, "compressed": 0.8765},
        "keep": {"requested": {"before_0": 0.5}, "achieved": {"before_0": 0.4953}},
        "macs_ratio": 0.512,
        "step_time": {"speedup": 1.87},
        "versions": {"cores": "2"},
        "export": {"format": None},
    }
    write_json(folder / "report.json", figures)
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
