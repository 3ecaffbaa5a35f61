"""Modules laid flat for machines without Laconic: the same text, in one folder, still finding their parts."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from laconic import modules
from laconic.modules import registry
from laconic.modules.estimators.base import Estimator
from laconic.modules.mergers.base import Merger
from laconic.modules.scorers.base import Scorer
from laconic.modules.selectors.base import Selector
from laconic.modules.shortcuts.base import Shortcut
from laconic.trainer.export.flatten import files_of, flattened
from laconic.trainer.export.formats.standalone import Standalone
from laconic.trainer.export.source import ExportSource, Settings
from laconic.trainer.run_folder import RunFolder
from tests.matrix import METHODS, compressed

ROOT = Path(modules.__file__ or "").parent
PLACES = {tuple(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")} - {("__init__",)}
PLACES = {place[:-1] if place[-1] == "__init__" else place for place in PLACES}

PARTS = {"scorers": Scorer, "selectors": Selector, "mergers": Merger, "estimators": Estimator, "shortcuts": Shortcut}


def _source(place: tuple[str, ...]) -> str:
    path = ROOT.joinpath(*place)
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def test_every_file_is_the_same_text_but_for_its_import_lines() -> None:
    flat = flattened(PLACES)
    assert len(flat) == len(PLACES)
    for place in PLACES:
        ours, theirs = _source(place).splitlines(), flat[f"{'_'.join(place)}.py"].splitlines()
        assert len(ours) == len(theirs)
        changed = [(mine, their) for mine, their in zip(ours, theirs, strict=True) if mine != their]
        for mine, their in changed:
            assert re.match(r"\s*from \.", mine), mine
            assert mine.partition(" import ")[0].lstrip(" from.").replace(".", "_") in their, (mine, their)


# What loads and saves from outside, with packages of its own; no model's own classes are written there.
OUTSIDE = "checkpoints"


def test_imports_lead_to_files_of_the_folder_and_to_torch_and_transformers_alone() -> None:
    flat = flattened({place for place in PLACES if place[0] != OUTSIDE})
    assert not [name for name in flat if name.startswith(OUTSIDE)]
    for name, text in flat.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                for target in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert f"{target}.py" in flat, (name, target)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                packages = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                tops = {package.partition(".")[0] for package in packages}
                assert tops <= sys.stdlib_module_names | {"torch", "transformers"}, (name, tops)


def test_a_model_takes_along_the_parts_it_has_and_no_others() -> None:
    files = set(files_of(compressed("vit", next(method for method in METHODS if method.name == "learned_fuse"), 0.5, 0.6)))
    carried = {name for name in files if "_" in name}
    assert {"scorers_learned.py", "selectors_top_k.py", "mergers_fuse.py", "backbones_vit.py"} <= carried
    assert not {"scorers_evidence.py", "selectors_threshold.py", "mergers_pool.py", "backbones_beit.py", "heads_vit.py"} & files
    assert not {name for name in files if name.startswith(("budget", "checkpoints", "cost_cost"))}


def test_transformers_finds_every_file_that_was_written_from_the_entry_alone(tmp_path: Path) -> None:
    model = compressed("vit", METHODS[0], 0.5, 0.6)
    nothing: Any = None
    Standalone.write(ExportSource(RunFolder(tmp_path), nothing, model, None, {}), Settings(), tmp_path)
    entry = tmp_path / "modeling_laconic.py"
    assert {Path(path) for path in get_relative_import_files(entry)} == set(tmp_path.glob("*.py")) - {entry}
    assert model.config.auto_map == {
        "AutoModel": "modeling_laconic.CompressedViTModel",
        "AutoModelForImageClassification": "modeling_laconic.CompressedViTForImageClassification",
    }


def test_parts_are_found_by_the_same_names_in_a_flat_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = tmp_path / "flat_laconic"
    flat.mkdir()
    for name, text in {"__init__.py": "", **flattened(PLACES)}.items():
        (flat / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    theirs: Any = importlib.import_module("flat_laconic.registry")
    for kind, base in PARTS.items():
        names = registry.names(f"{modules.__name__}.{kind}")
        assert theirs.names(f"flat_laconic.{kind}") == names
        own_base = getattr(importlib.import_module(f"flat_laconic.{kind}_base"), base.__name__)
        for name in names:
            assert (
                theirs.find(f"flat_laconic.{kind}", name, own_base).__name__
                == registry.find(f"{modules.__name__}.{kind}", name, base).__name__
            )
    assert (
        importlib.import_module("flat_laconic.backbones").families().keys()
        == importlib.import_module(f"{modules.__name__}.backbones").families().keys()
    )
    # Two copies in one process do not take each other's packed rows for their own.
    theirs, ours = importlib.import_module("flat_laconic.tokens_ragged"), importlib.import_module(f"{modules.__name__}.tokens.ragged")
    assert theirs.ATTENTION != ours.ATTENTION


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.py": "from .. import b"}, "imports from outside the package"),
        ({"a.py": "from . import missing"}, "must name files of the folder"),
        ({"a.py": "from .missing import b"}, "which is not a file of the package"),
        ({"a.py": "from .b_c import x\nfrom .b.c import y", "b_c.py": "", "b/__init__.py": "", "b/c.py": ""}, "the same name"),
    ],
)
def test_what_cannot_be_laid_flat_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    package = ModuleType("package")
    package.__file__ = str(tmp_path / "__init__.py")
    with pytest.raises(ValueError, match=message):
        flattened([("a",)], package)


def test_files_of_deeper_folders_are_renamed_where_they_are_imported_as_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in {"a.py": "", "deep/__init__.py": "", "deep/b.py": "from . import c\nfrom .. import a\n", "deep/c.py": ""}.items():
        (tmp_path / name).write_text(text)
    package = ModuleType("package")
    package.__file__ = str(tmp_path / "__init__.py")
    assert flattened([("deep", "b")], package) == {
        "a.py": "",
        "deep_b.py": "from . import deep_c as c\nfrom . import a\n",
        "deep_c.py": "",
    }
