"""The ``merged`` format: one folder of safetensors and config, routers included, for ``laconic.from_pretrained``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from ..evaluate import load_model, model_folder, recipe_of
from ..recipe_files import RecipeError
from ..report import versions, write_json
from ..tasks.base import task_named

TOLERANCE = 1e-5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Runs where nothing of this process is left: what the folder holds must be enough.
_CLEAN = """
import sys, torch
from safetensors.torch import load_file, save_file
from pathlib import Path
from laconic.trainer.evaluate import load_model
folder, probe, out = sys.argv[1:]
model = load_model(Path(folder))
with torch.no_grad():
    inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in load_file(probe).items()}
    logits = model(**inputs).logits
save_file({"logits": logits.float().contiguous()}, out)
"""


def export_merged(run: str, to: str, dtype: str = "fp32") -> dict[str, Any]:
    """Writes and verifies an export; returns what ``export.json`` holds.

    Args:
        run: run folder.
        to: folder to write; must not exist yet, or be empty.
        dtype: of the weights, ``fp32`` or ``bf16``.

    Raises:
        RecipeError: the run has no model, or ``to`` is taken.
        RuntimeError: the reloaded model answers otherwise; the folder is left for a look, without ``export.json``.
    """
    source, recipe = model_folder(run)
    folder = Path(to)
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"--to {to}: the folder is not empty; give a new one")
    model = load_model(source)
    inputs = task_named(recipe_of(run, []).task).probe(model.config)
    with torch.no_grad():
        of_run = model(**inputs).logits
    model.to(_DTYPES[dtype]).save_pretrained(folder)
    if (source / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    shutil.copy(recipe, folder / "recipe.yaml")
    with torch.no_grad():
        cast = model(**{key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}).logits.float()
    reloaded = _answer(folder, inputs)
    if (reloaded - cast).abs().max() > TOLERANCE:
        raise RuntimeError(f"the export in {folder} answers otherwise when it is loaded: off by {float((reloaded - cast).abs().max()):.2e}")
    difference = float((reloaded - of_run).abs().max())
    record = {
        "format": "merged",
        "dtype": dtype,
        # Against the run's own float32 answers; reloading itself adds nothing, or the export fails.
        "max_abs_logit_diff": difference,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "versions": versions(),
    }
    write_json(folder / "export.json", record)
    _note_in_report(Path(run), record)
    return record


def _answer(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the folder's model, loaded in a new process. Raises RuntimeError where it cannot be loaded."""
    probe, answer = folder / "probe.partial", folder / "answer.partial"
    try:
        save_file(inputs, probe)
        command = [sys.executable, "-c", _CLEAN, str(folder), str(probe), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the export in {folder} cannot be loaded in a clean process: {done.stderr.strip().splitlines()[-1]}")
        return load_file(answer)["logits"]
    finally:
        probe.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)


def _note_in_report(run: Path, record: dict[str, Any]) -> None:
    path = run / "report.json"
    if path.is_file():
        report = json.loads(path.read_text())
        report["export"] = {"format": record["format"], "dtype": record["dtype"], "max_abs_logit_diff": record["max_abs_logit_diff"]}
        write_json(path, report)
