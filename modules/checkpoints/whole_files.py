"""Files and folders that exist completely or not at all, and hashes that show damage.

A process can be killed, and a disk can be full, at any moment. What is written here lies beside its place until it is on the disk, and is
renamed then; a name therefore always stands for whole content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

HASHES = "hashes.json"
PARTIAL = ".partial"
# Edited by people: their content is no part of a model.
_NOTES = ("README.md", HASHES)


class DamagedFile(ValueError):
    """A file is missing, truncated, or has other content than was written."""


def write_file(path: Path, write: Callable[[BinaryIO], Any] | bytes | str) -> None:
    """Writes a file, or leaves the one that is there.

    Args:
        path: file to write; its folder is made.
        write: function that writes to the open file, or the content; text is UTF-8.

    Raises:
        OSError: the file could not be written; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    content = write.encode() if isinstance(write, str) else write
    try:
        with partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Writes readable JSON as ``write_file`` does."""
    write_file(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Context with a new folder to fill, which takes its place at the end; after an error nothing is left, and an older folder stays.

    Args:
        folder: place of the folder. An existing one is replaced.
    """
    partial, older = (folder.with_name(f"{folder.name}{ending}{PARTIAL}") for ending in ("", ".older"))
    for stale in (partial, older):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            # Set aside whole: a kill while it is deleted would leave a part of it under its name.
            os.replace(folder, older)
        os.replace(partial, folder)
    except BaseException:
        if older.exists() and not folder.exists():
            os.replace(older, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(older, ignore_errors=True)
    _sync(folder.parent)


def hashes_of(folder: Path) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of every file in a folder, by relative path; model cards and the hashes themselves are left out."""
    return {str(path.relative_to(folder)): _about(path) for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _NOTES}


def write_hashes(folder: Path) -> None:
    """Records the files of a folder in its ``hashes.json``."""
    write_json(folder / HASHES, hashes_of(folder))


def check_hashes(folder: Path) -> None:
    """Compares a folder with its ``hashes.json``; one without is not checked.

    Raises:
        DamagedFile: a file differs from what was written.
    """
    if not (folder / HASHES).is_file():
        return
    try:
        recorded = json.loads((folder / HASHES).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{folder / HASHES} is damaged: {error}") from None
    compare(folder, recorded, HASHES)


def compare(folder: Path, recorded: Mapping[str, Any], record: str) -> None:
    """Compares the files of a folder with recorded hashes.

    Args:
        folder: folder of the files.
        recorded: result of ``hashes_of``.
        record: name of the file with the hashes, for messages.

    Raises:
        DamagedFile: a file is missing or differs; the message names the first one.
    """
    if not isinstance(recorded, Mapping):
        raise DamagedFile(f"{folder / record} is damaged: it holds {type(recorded).__name__} in place of files: get the folder again")
    cure = f"get the folder again, or write it again; if you changed the file yourself, delete its entry in {folder / record}"
    for name, about in recorded.items():
        path = folder / name
        if path.name in _NOTES:
            continue
        if not isinstance(about, dict) or ".." in Path(name).parts or Path(name).is_absolute():
            raise DamagedFile(f"{folder / record} is damaged: its entry {name!r} is not of a file in the folder")
        if not path.is_file():
            raise DamagedFile(f"{path} is missing: {cure}")
        if path.stat().st_size != about.get("bytes"):
            raise DamagedFile(f"{path} is damaged: it has {path.stat().st_size} bytes of {about.get('bytes')}; {cure}")
        if _about(path)["sha256"] != about.get("sha256"):
            raise DamagedFile(f"{path} is damaged: its SHA-256 is not the one in {record}; {cure}")


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
