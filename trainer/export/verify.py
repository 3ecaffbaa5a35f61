"""Answers of an export in a new process, where nothing of this one is left: what the folder holds must be enough."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .base import Format

_PROGRAM = """
import sys
for name in {without!r}:
    # Importing it now fails, as on a machine that does not have it.
    sys.modules[name] = None
NEW_TOKENS = {new_tokens}
{program}
from safetensors.{tensors} import load_file, save_file
folder, *files = sys.argv[1:]
answers = load(folder)
for batch, out in zip(files[::2], files[1::2]):
    save_file(answers(load_file(batch)), out)
"""


def clean_answers(form: type[Format], folder: Path, batches: list[dict[str, Tensor]], new_tokens: int) -> list[dict[str, Tensor]]:
    """What the export in a folder answers to each batch.

    Args:
        form: what the folder holds.
        folder: of the export.
        batches: inputs by name.
        new_tokens: to generate; 0 generates none, and formats of graphs never do.

    Raises:
        RuntimeError: it cannot be loaded, or fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        files: list[str] = []
        for index, batch in enumerate(batches):
            files += [f"{temporary}/batch{index}.safetensors", f"{temporary}/answer{index}.safetensors"]
            save_file({key: value.contiguous() for key, value in batch.items()}, files[-2])
        program = _PROGRAM.format(without=form.without, program=form.program, tensors=form.tensors, new_tokens=new_tokens)
        # Code that comes with an export is copied to a cache before it runs; the user's own is none of our business.
        environment = {**os.environ, "HF_MODULES_CACHE": f"{temporary}/modules", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = run_python(program, [str(folder), *files], environment)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(f"the export in {folder} cannot be loaded in a clean process: {said[-1]}")
        return [load_file(file) for file in files[1::2]]


def run_python(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a program in a new Python process, with these environment variables and no others."""
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, env=environment)
