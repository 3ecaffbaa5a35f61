"""The files of ``laconic.modules`` that a model needs, moved into one flat folder; only their import lines change.

transformers' loader of remote code copies only files of the same folder that lines ``from .name import …`` name (seen with 5.17 and
5.23). So ``scorers/learned.py`` becomes ``scorers_learned.py``, and its ``from ..linear import …`` becomes ``from .linear import …``.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel

from ... import modules
from ...modules import registry
from ...modules.compressed_model import CompressedModel
from ...modules.config import PARTS
from ...modules.stage import stages_of
from ..errors import RecipeError

_IMPORT = re.compile(r"^(?P<indent>[ \t]*)from (?P<dots>\.+)(?P<path>[\w.]*) import (?P<what>.*)$", re.MULTILINE)

# Path of a file in the package: ("scorers", "learned"), or ("scorers",) for the __init__.py of a folder.
Place = tuple[str, ...]


def files_of(model: PreTrainedModel) -> dict[str, str]:
    """Text by file name of the files that define a model's classes, and of the files they import.

    Args:
        model: compressed model; only the files of its own parts are included.
    """
    assert isinstance(model, CompressedModel)
    package = modules.__name__
    classes = (
        {cls for module in model.modules() for cls in type(module).__mro__}
        | {cls for stage in stages_of(model).values() for cls in stage.adapter.__mro__}
        | set(model.adapter.__mro__)
    )
    names = {cls.__module__ for cls in classes if cls.__module__.startswith(f"{package}.")}
    places = {tuple(name.removeprefix(f"{package}.").split(".")) for name in names}
    outside, imported = _outside(model)
    places |= imported
    # The registry finds a part through its folder, so the folders above it are needed too.
    flat = flattened(places | {place[:depth] for place in places for depth in range(1, len(place))})
    return {**flat, **outside}


def _outside(model: PreTrainedModel) -> tuple[dict[str, str], set[Place]]:
    """Text by file name of parts from other packages, and the files of ``laconic.modules`` that they import.

    Raises:
        RecipeError: a part's file imports more than the standard library, torch, transformers and ``laconic.modules``.
    """
    files: dict[str, str] = {}
    imported: set[Place] = set()
    for stage in stages_of(model).values():
        for kind, part in ((kind, getattr(stage, kind)) for kind in PARTS):
            if part is None or type(part).__module__.startswith(f"{modules.__name__}."):
                continue
            name = registry.name_of(kind, type(part))
            source = inspect.getsourcefile(type(part))
            if name is None or source is None:
                raise RecipeError(
                    f"--format standalone: {kind} {type(part).__qualname__} has no registered name; offer it as an entry point"
                )
            text, places = _outside_text(Path(source), f"{kind} {name!r}")
            # The path where the registry looks for a part of that name in a flat folder.
            folder = tuple(registry.KINDS[kind].folder.split("."))
            files[f"{_flat((*folder, name))}.py"] = text
            imported |= places | {folder}
    return files, imported


def _outside_text(path: Path, part: str) -> tuple[str, set[Place]]:
    text = path.read_text(encoding="utf-8")
    imported: set[Place] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith(f"{modules.__name__}."):
            imported.add(tuple((node.module or "").removeprefix(f"{modules.__name__}.").split(".")))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else ["." * node.level + (node.module or "")]
            for module in found:
                if module.partition(".")[0] not in (*sys.stdlib_module_names, "torch", "transformers"):
                    raise RecipeError(
                        f"--format standalone: {part} cannot be included: {path.name} imports {module}, and an exported folder has torch, "
                        f"transformers and what is imported as 'from {modules.__name__}.… import …'"
                    )
    pattern = re.compile(rf"^(?P<indent>[ \t]*)from {re.escape(modules.__name__)}\.(?P<path>[\w.]+) import ", re.MULTILINE)
    return pattern.sub(lambda match: f"{match['indent']}from .{_flat(tuple(match['path'].split('.')))} import ", text), imported


def flattened(places: Iterable[Place], package: ModuleType = modules) -> dict[str, str]:
    """Text by file name of some files of a package and of all files that they import from it.

    Raises:
        ValueError: an import has an unsupported form, or two files would have the same name.
    """
    assert package.__file__ is not None
    root = Path(package.__file__).parent
    found: dict[Place, str] = {}
    open_places = set(places)
    while open_places:
        place = open_places.pop()
        text, imported = _rewritten(root, place)
        found[place] = text
        open_places |= imported - found.keys()
    flat = {f"{_flat(place)}.py": text for place, text in sorted(found.items())}
    if len(flat) < len(found):
        raise ValueError(
            f"two files of {package.__name__} have the same name in one flat folder: {', '.join(map('.'.join, sorted(found)))}"
        )
    return flat


def _rewritten(root: Path, place: Place) -> tuple[str, set[Place]]:
    """A file's text with rewritten package imports, and the places it imports from."""
    path = _path(root, place)
    assert path is not None, place
    here = place if path.name == "__init__.py" else place[:-1]
    imported: set[Place] = set()

    def rewrite(match: re.Match[str]) -> str:
        above = len(match["dots"]) - 1
        if above > len(here):
            raise ValueError(f"{path}: {match[0].strip()!r} imports from outside the package, which an exported folder does not have")
        base = here[: len(here) - above]
        if match["path"]:
            target = (*base, *match["path"].split("."))
            imported.add(target)
            return f"{match['indent']}from .{_flat(target)} import {match['what']}"
        # These names are files, not objects in a file.
        named = []
        for name in (item.strip() for item in match["what"].split(",")):
            target = (*base, name)
            if not name.isidentifier() or _path(root, target) is None:
                raise ValueError(f"{path}: {match[0].strip()!r} must name files of the folder, on one line")
            imported.add(target)
            named.append(name if _flat(target) == name else f"{_flat(target)} as {name}")
        return f"{match['indent']}from . import {', '.join(named)}"

    text = path.read_text(encoding="utf-8")
    text = _IMPORT.sub(rewrite, text)
    for target in imported:
        if _path(root, target) is None:
            raise ValueError(f"{path} imports {'.'.join(target)}, which is not a file of the package")
    return text, imported


def _path(root: Path, place: Place) -> Path | None:
    """The file at a place; None if there is none."""
    for path in (root.joinpath(*place).with_suffix(".py"), root.joinpath(*place, "__init__.py")):
        if place and path.is_file():
            return path
    return None


def _flat(place: Place) -> str:
    return "_".join(place)
