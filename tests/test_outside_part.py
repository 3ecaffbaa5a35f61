"""A part of another package, docs/examples/outside_part, once it is installed: recipes, the matrix of the tests, and a standalone export."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPORT = """
import sys
from pathlib import Path
from laconic.modules.registry import part_names
from laconic.trainer.export.export import export
from tests import matrix
from tests.trainer.export_runs import written_run

assert "norm" in part_names("scorer")
folder, out = sys.argv[1:]
method = next(method for method in matrix.METHODS if method.name == "norm")
export(str(written_run(Path(folder), matrix.compressed("vit", method, 0.5, 0.6))), out, "standalone")
"""
LOAD = """
import importlib.util, sys
assert importlib.util.find_spec("laconic_norm_scorer") is None
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
import torch
print(tuple(model(pixel_values=torch.zeros(1, 3, model.config.image_size, model.config.image_size)).logits.shape))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which Python finds the package."""
    target = tmp_path_factory.mktemp("installed")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(ROOT / "docs" / "examples" / "outside_part")], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_its_line_of_the_matrix_passes(environment: dict[str, str]) -> None:
    run = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "norm and (vit or bert or llama)"]
    done = subprocess.run(
        [*run, "tests/modules/test_invariants.py", "tests/modules/test_rehearsal.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_standalone_export_carries_it(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path / "run"), str(out)], cwd=ROOT, env=environment, check=True)
    without = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(out)], cwd=tmp_path, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 5)"
