"""The embedded text: source files of the running Python's standard library. Needs no network and copies nothing.

The set of files depends on the version of Python; the split of a file depends on its name alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")
# Left out: tests (many installations lack them), tables of characters, and build files (they contain paths of this machine).
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_BUILT = ("_sysconfigdata", "config-")
_SUFFIXES = (".py", ".txt")
# A larger file would dominate the split it falls into.
_LARGEST_BYTES = 250_000
_TEST, _VALIDATION = 0.05, 0.1


def library_files(split: str, limit: int | None = None, root: Path | None = None) -> list[tuple[str, Path]]:
    """(name relative to the library, path) of each file of a split, in a fixed order. No file is in two splits; run seeds have no effect.

    Args:
        split: ``train`` (nine tenths of the files), ``validation`` or ``test``.
        limit: highest number of files; None returns all.
        root: folder of the standard library; None uses the running Python's.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r} must be one of {', '.join(SPLITS)}")
    root = root or Path(os.__file__).parent
    drawn = sorted((draw_of(name), name, path) for name, path in text_files(root))
    chosen = [(name, path) for draw, name, path in drawn if _split(draw) == split]
    # Ordered by hash, so that the first few files are a random sample.
    return chosen[:limit]


def text_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to the library, path) of every file of usable text, in any order."""
    for folder, folders, files in os.walk(root):
        # In place, so that os.walk skips these folders; site-packages can be large.
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith(_BUILT)]
        for path in (Path(folder, name) for name in files if name.endswith(_SUFFIXES) and not name.startswith(_BUILT)):
            if 0 < path.stat().st_size <= _LARGEST_BYTES:
                yield path.relative_to(root).as_posix(), path


def draw_of(name: str) -> float:
    """A number in [0, 1), the hash of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _split(draw: float) -> str:
    return "test" if draw < _TEST else "validation" if draw < _VALIDATION else "train"
