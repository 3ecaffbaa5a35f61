"""The ``adapter`` format: PEFT's two files, routers beside them, for whoever has the base."""

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

from ...modules.adapter_folder import read_adapter, write_adapter
from ...modules.loading import find_adapter, from_pretrained
from ..build import image_input
from ..evaluate import model_folder, recipe_of
from ..recipe_files import RecipeError
from ..report import versions, write_json
from ..tasks.base import task_named

# Runs where nothing of this process is left. Answers, and how many of the tensors in PEFT's file plain PEFT finds again in the plain base.
_CLEAN = """
import json, sys, torch, laconic
from safetensors.torch import load_file, save_file
folder, probe, out = sys.argv[1:]
model = laconic.from_pretrained(folder)
with torch.no_grad():
    logits = model(**load_file(probe)).logits
told = {"wrong": [], "tensors": 0}
manifest = json.load(open(folder + "/manifest.json"))
if manifest["lora"]:
    from peft import PeftModel, get_peft_model_state_dict
    from laconic.modules.adapter_folder import read_adapter
    from laconic.modules.adapters import load_base
    plain = PeftModel.from_pretrained(load_base(read_adapter(folder), folder), folder)
    ours, theirs = load_file(folder + "/adapter_model.safetensors"), get_peft_model_state_dict(plain, save_embedding_layers=False)
    told = {"wrong": [name for name, value in ours.items() if name not in theirs or not torch.equal(theirs[name], value)], "tensors": len(ours)}
save_file({"logits": logits.contiguous()}, out, {"told": json.dumps(told)})
"""


def export_adapter(run: str, to: str) -> dict[str, Any]:
    """Writes and verifies an adapter folder; returns what ``export.json`` holds.

    Args:
        run: folder of a run that trained on frozen weights.
        to: folder to write; must not exist yet, or be empty.

    Raises:
        RecipeError: the run trained all weights, or ``to`` is taken.
        RuntimeError: the folder answers otherwise when it is loaded, or plain PEFT does not find all of it.
    """
    folder, source = Path(to), find_adapter(run)
    if source is None:
        raise RecipeError(f"{run} trained all weights, or holds no model yet: there is no adapter; give --format merged")
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"--to {to}: the folder is not empty; give a new one")
    _, recipe = model_folder(run)
    write_adapter(read_adapter(source), folder)
    shutil.copy(recipe, folder / "recipe.yaml")
    model = from_pretrained(source)
    inputs = task_named(recipe_of(run, []).task).probe(*image_input(model.config), model.config)
    with torch.no_grad():
        expected = model(**inputs).logits
    answer, told = _answer(folder, inputs)
    difference = float((answer - expected).abs().max())
    if difference or told["wrong"]:
        raise RuntimeError(
            f"the adapter in {folder} is not what was trained: logits off by {difference:.2e}, wrong in PEFT: {told['wrong'][:3]}"
        )
    record = {
        "format": "adapter",
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "max_abs_logit_diff": difference,
        "tensors_in_peft": told["tensors"],
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "versions": versions(),
    }
    write_json(folder / "export.json", record)
    return record


def _answer(folder: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Logits of the folder's model, loaded in a new process, and what plain PEFT found there. Raises RuntimeError where it cannot be."""
    from safetensors import safe_open

    probe, answer = folder / "probe.partial", folder / "answer.partial"
    try:
        save_file(inputs, probe)
        command = [sys.executable, "-c", _CLEAN, str(folder), str(probe), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the adapter in {folder} cannot be loaded in a clean process: {done.stderr.strip().splitlines()[-1]}")
        with safe_open(answer, "pt") as file:
            told = json.loads(file.metadata()["told"])
        return load_file(answer)["logits"], told
    finally:
        probe.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
