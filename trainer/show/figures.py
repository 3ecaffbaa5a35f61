"""Figures of matplotlib: names of users as plain text, and files that are whole or not there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...modules.checkpoints.whole_files import write_file


def plain(text: str) -> str:
    """A text that matplotlib shows as it is: not as a formula between two ``$``, and as a label that legends have, in spite of a leading
    ``_``."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def save(figure: Any, paths: Sequence[Path], dpi: int) -> None:
    """Writes a figure to files, in the format that their names end with.

    Args:
        figure: the figure.
        paths: files that end in ``.png`` or ``.svg``.
        dpi: pixels per inch of a PNG.
    """
    for path in paths:
        write_file(path, functools.partial(figure.savefig, format=path.suffix[1:], dpi=dpi))
