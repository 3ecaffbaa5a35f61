"""The embedded text: source and text of the running Python's standard library. Needs no network, and nothing of it is copied here.

Which files there are depends on the version of Python, and how they are shared out on their names alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")
# Tests are missing from many installations; tables of characters are no text; what was built on this machine names its folders.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_BUILT = ("_sysconfigdata", "config-")
_SUFFIXES = (".py", ".txt")
# One larger file would be most of the split that it falls into.
_LARGEST_BYTES = 250_000
_TEST, _VALIDATION = 0.05, 0.1


def library_files(split: str, limit: int | None = None, root: Path | None = None) -> list[tuple[str, Path]]:
    """Files of a split in a fixed order, by their names relative to the library; splits share none, whatever the seed of a run.

    Args:
        split: ``train`` (nine tenths of the files), ``validation`` or ``test``.
        limit: at most so many; None takes all.
        root: folder of the library; None takes the running Python's.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r} must be one of {', '.join(SPLITS)}")
    root = root or Path(os.__file__).parent
    drawn = sorted((draw_of(name), name, path) for name, path in text_files(root))
    chosen = [(name, path) for draw, name, path in drawn if _split(draw) == split]
    # In the order of the draws, so that a few files are a mixture of all.
    return chosen[:limit]


def text_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Name relative to the library and path of every file that is text to learn from, in any order."""
    for folder, folders, files in os.walk(root):
        # In place: what is left out is not walked through, and other packages are many.
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith(_BUILT)]
        for path in (Path(folder, name) for name in files if name.endswith(_SUFFIXES) and not name.startswith(_BUILT)):
            if 0 < path.stat().st_size <= _LARGEST_BYTES:
                yield path.relative_to(root).as_posix(), path


def draw_of(name: str) -> float:
    """A number in [0, 1) that belongs to a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _split(draw: float) -> str:
    return "test" if draw < _TEST else "validation" if draw < _VALIDATION else "train"
