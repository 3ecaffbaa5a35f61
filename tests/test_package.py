"""The package: what a wheel holds, what its top level is, and that its examples run."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.pages.markdown import PAGES

ROOT = Path(__file__).resolve().parents[1]
TREE = ("modules", "trainer", "data", "recipes")


@pytest.mark.slow
def test_a_wheel_in_a_clean_environment_holds_the_tree(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("laconic-*.whl")
    expected = {
        f"laconic/{path.relative_to(ROOT)}"
        for folder in TREE
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"laconic/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    check = "import laconic, pathlib; print(laconic.__version__, pathlib.Path(laconic.__file__).parent)"
    # Not what lies in a folder that the variable names.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", check], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    version, where = done.stdout.split()
    assert version == "0.1.0"
    installed = {
        str(path.relative_to(Path(where).parent)) for path in Path(where).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert installed == expected


@pytest.mark.parametrize("name", TREE)
def test_the_folders_refuse_to_be_imported_by_their_bare_names(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"import laconic.{name} instead of {name}" in done.stderr


def test_modules_import_neither_lightning_nor_the_other_folders() -> None:
    for path in (ROOT / "modules").rglob("*.py"):
        text = path.read_text()
        assert "lightning" not in text.replace("Lightning", "")
        assert "pydantic import" not in text
        for other in ("trainer", "data", "recipes"):
            assert f"from ..{other}" not in text
            assert f"from ...{other}" not in text


HEAVY = ("torch", "transformers", "datasets", "numpy", "PIL", "lightning")


def _imported(name: str) -> list[str]:
    """Which of the heavy libraries a new process has after importing a module."""
    check = f"import sys, {name}; print(*[item for item in {HEAVY!r} if item in sys.modules])"
    return subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.split()


def test_the_schema_of_the_data_needs_no_heavy_library() -> None:
    assert _imported("laconic.trainer.recipe.data_kinds") == []


def test_reading_a_recipe_needs_no_heavy_library() -> None:
    assert _imported("laconic.trainer.recipe.files") == []


@pytest.mark.parametrize(
    "use",
    [
        "from laconic.modules import registry; assert registry.part_names('scorer') and registry.part_names('regularizer')",
        "from laconic.modules.config import CompressionConfig as C; C.from_dict(C([{'layer': 1, 'scorer': 'evidence'}]).to_dict())",
        "from laconic.modules.budget.config import BudgetConfig; BudgetConfig(regularizer={'name': 'ratio_mse', 'weight': 2})",
    ],
    ids=["registry", "config", "budget_config"],
)
def test_what_recipes_are_checked_by_needs_no_torch(use: str) -> None:
    program = f"{use}; import sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_public_names_are_there() -> None:
    import laconic

    assert all(getattr(laconic, name) is not None for name in laconic.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'compres'; it has"):
        laconic.compres  # noqa: B018


@pytest.mark.parametrize("example", ["plain_loop", "lightning_module", "hf_trainer", "lora"])
def test_the_examples_of_own_loops_run(example: str) -> None:
    main = runpy.run_path(str(ROOT / "docs" / "examples" / f"{example}.py"))["main"]
    assert main(steps=3) == pytest.approx(0.36, abs=0.1)


def test_the_python_of_the_readme_runs() -> None:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16, "patch_size": 2}
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    names = {"model": ViTForImageClassification(ViTConfig(**sizes)), "batch": batch, "step": 0}
    exec(PAGES[0].blocks("python")[0], names)
    assert names["trace"].routings.keys() == {"before_3"}  # type: ignore[attr-defined]
    assert torch.isfinite(names["loss"])  # type: ignore[arg-type]
