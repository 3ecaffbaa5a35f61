"""Where a file that cannot be read is broken."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..rows import BadRows
from ..source import DataSource

Item = TypeVar("Item")
_LINES = (".jsonl", ".ndjson", ".json")
_TEXTS = (*_LINES, ".txt", ".csv", ".tsv", ".md")
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class BrokenFile(BadRows):
    """A file of the data cannot be read."""


@contextlib.contextmanager
def named_faults(source: DataSource) -> Iterator[None]:
    """Context that opens or reads a data set; an error in it names the file and line that are broken.

    Args:
        source: name and files of the data set.

    Raises:
        BrokenFile: a file cannot be read.
    """
    try:
        yield
    except Exception as error:
        # datasets raises errors of many types.
        where = source.data_dir or source.data_files or "the hub"
        fault = next(filter(None, map(file_fault, local_files(source))), None)
        cause = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise BrokenFile(f"data.name = {source.name!r} cannot be opened from {where}: {fault or cause[0]}") from None


class _Reading(Iterable[Item]):
    """Items that can be read several times, with errors named as in ``named_faults``."""

    def __init__(self, source: DataSource, items: Iterable[Item]) -> None:
        self.source, self.items = source, items

    def __iter__(self) -> Iterator[Item]:
        with named_faults(self.source):
            yield from self.items


def read_from(source: DataSource, items: Iterable[Item]) -> Iterable[Item]:
    """The items of a stream; an error while they are read names the file and line that are broken."""
    return _Reading(source, items)


def local_files(source: DataSource) -> list[Path]:
    """Files of a data set on this machine, patterns expanded."""
    root, found = Path(source.data_dir or "."), []
    for pattern in _patterns(source.data_files):
        path = Path(pattern) if Path(pattern).is_absolute() else root / pattern
        found += [path] if path.is_file() else sorted(item for item in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    if source.data_files is None and source.data_dir is not None:
        found += sorted(root.rglob("*"))
    return [path for path in found if path.is_file()]


def _patterns(files: Any) -> list[str]:
    if isinstance(files, str):
        return [files]
    return [name for item in (files.values() if isinstance(files, dict) else files or ()) for name in _patterns(item)]


def file_fault(path: Path) -> str | None:
    """What is wrong with a file of text: its encoding, or a line that is not JSON; None if nothing is found, or it is another file."""
    if path.suffix not in _TEXTS:
        return None
    with path.open("rb") as file:
        if (mark := _MARKS.get(file.read(2))) is not None:
            return f"{path} is {mark}: convert it to UTF-8, with iconv -f {mark.lower()} -t utf-8 for example"
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8: convert the file to UTF-8"
            if path.suffix in _LINES and text.strip():
                if number == 1 and not _is_json(text) and path.suffix == ".json":
                    # One value over all lines.
                    return _whole_fault(path)
                if not _is_json(text):
                    cut = "; the file ends in this line: it may be cut" if not line.endswith(b"\n") else ""
                    return f"{path}, line {number}: not a JSON value: {text.strip()[:60]!r}{cut}"
    return None


def _whole_fault(path: Path) -> str | None:
    try:
        json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: {error.msg}"
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
