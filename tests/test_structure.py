"""The layout of the code: no circles, imports in one direction, few flat files, short files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.loaded_script import loaded_script

FLAT = {"modules": 10, "trainer": 8, "data": 6}
LINES = 400


script = loaded_script("structure")


@pytest.fixture(scope="module")
def found() -> Any:
    return script.structure()


def test_no_two_files_import_each_other_directly_or_over_others(found: Any) -> None:
    assert found.circles == []


def test_imports_go_from_recipes_to_trainer_to_data_and_modules(found: Any) -> None:
    assert found.against == []


def test_every_import_names_a_file(found: Any) -> None:
    assert found.missing == ()


@pytest.mark.parametrize("folder", list(FLAT))
def test_few_files_lie_flat_in_a_folder(folder: str, found: Any) -> None:
    assert 0 < found.flat[folder] <= FLAT[folder]


def test_no_file_is_longer_than_400_lines(found: Any) -> None:
    assert {str(path): lines for path, lines in found.lines.items() if lines > LINES} == {}


def _written(root: Path, files: dict[str, str]) -> Any:
    """Structure of a checkout that has these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return script.structure(root)


HIDDEN = [
    "from .b import y",
    "from . import b",
    "from ..modules import b",
    "import laconic.modules.b",
    "from laconic.modules import b",
    "from laconic.modules.b import y",
    "def f():\n    from .b import y",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import y",
    "class A:\n    def f(self):\n        try:\n            import laconic.modules.b as other\n        except ImportError:\n            pass",
]


@pytest.mark.parametrize("written", HIDDEN)
def test_an_import_is_seen_wherever_it_stands_and_however_it_is_written(written: str, tmp_path: Path) -> None:
    tree = _written(
        tmp_path, {"modules/__init__.py": "", "modules/a.py": written, "modules/b.py": "from .deep.c import z", "modules/deep/c.py": ""}
    )
    assert tree.imports["modules.a"] - {"modules"} == {"modules.b"}
    assert tree.imports["modules.b"] == {"modules.deep.c"}
    assert tree.circles == []
    again = _written(tmp_path, {"modules/deep/c.py": "def f():\n    from ..a import x"})
    assert again.circles == [["modules.a", "modules.b", "modules.deep.c"]]


def test_imports_against_the_direction_and_of_nothing_are_seen(tmp_path: Path) -> None:
    files = {f"{folder}/__init__.py": "" for folder in ("recipes", "trainer", "data", "modules", "laconic")}
    files |= {"modules/a.py": "from ..data import rows", "data/rows.py": "from ..modules.b import y", "modules/b.py": ""}
    files |= {
        "data/up.py": "def f():\n    from laconic.trainer.run import train",
        "trainer/run.py": "from ..recipes import x\nfrom ..data import rows",
    }
    files |= {
        "modules/c.py": "from laconic import compress",
        "modules/d.py": "from .gone import x",
        "laconic/__main__.py": "from ..trainer import run",
    }
    tree = _written(tmp_path, files)
    assert tree.against == [
        ("data.up", "trainer.run"),
        ("modules.a", "data.rows"),
        ("modules.c", "laconic"),
        ("trainer.run", "recipes"),
    ]
    assert tree.missing == (("laconic.__main__", "..trainer"), ("modules.d", "modules.gone"))
    assert tree.circles == []


def test_the_command_exits_with_1_where_something_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"modules/a.py": "from .b import x", "modules/b.py": "\n\n\n", "trainer/__init__.py": ""}
    _written(tmp_path, files)
    assert script.main(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "flat files: recipes 0, trainer 0, data 0, modules 2" in shown
    assert "longest file: modules/b.py, 3 lines" in shown
    (tmp_path / "modules" / "b.py").write_text("from .a import x")
    assert script.main(tmp_path) == 1
    assert "import circles: 1\n    modules.a, modules.b\n" in capsys.readouterr().out
