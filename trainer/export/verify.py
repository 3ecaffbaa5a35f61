"""Answers of an export in a new process, which has nothing but the folder."""

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
    # Makes importing the package fail, as on a machine without it.
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
    """Answers of the export in a folder to each batch.

    Args:
        form: format of the export.
        folder: folder of the export.
        batches: inputs by name.
        new_tokens: number of tokens to generate; 0 generates none. Graph formats never generate.

    Raises:
        RuntimeError: the export cannot be loaded, or its forward fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        files: list[str] = []
        for index, batch in enumerate(batches):
            files += [f"{temporary}/batch{index}.safetensors", f"{temporary}/answer{index}.safetensors"]
            save_file({key: value.contiguous() for key, value in batch.items()}, files[-2])
        program = _PROGRAM.format(without=form.without, program=form.program, tensors=form.tensors, new_tokens=new_tokens)
        # transformers copies an export's code to a cache before running it: use a temporary one instead of the user's.
        environment = {**os.environ, "HF_MODULES_CACHE": f"{temporary}/modules", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = run_python(program, [str(folder), *files], environment)
        if done.returncode:
            errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(f"the export in {folder} cannot be loaded in a clean process: {errors[-1]}")
        return [load_file(file) for file in files[1::2]]


def run_python(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a program in a new Python process, with these environment variables and no others."""
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, env=environment)
