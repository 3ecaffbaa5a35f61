"""Files that a command is to write, checked before anything is measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path

from ..errors import RecipeError


def check_target(option: str, path: Path, keys: Collection[str]) -> None:
    """Checks a JSON file, and makes its folder.

    Args:
        option: the option that names it, for messages.
        path: the file.
        keys: keys of the JSON that earlier calls of the command wrote, and that this call may replace.

    Raises:
        RecipeError: it cannot be written, or holds something else.
    """
    check_folder(option, path)
    if not path.exists():
        return
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not data.keys() >= set(keys):
        raise RecipeError(f"{option}: {path} exists, and no such command wrote it: name another file, or delete it")


def check_folder(option: str, path: Path) -> None:
    """Makes the folder of a file. Raises RecipeError if the file cannot be written.

    Args:
        option: the option that names it, for messages.
        path: the file.
    """
    if path.is_dir():
        raise RecipeError(f"{option}: {path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RecipeError(f"{option}: {path} cannot be written: {error.strerror}; name a file elsewhere") from None
