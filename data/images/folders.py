"""Compares an imagefolder on disk with what ``datasets`` loaded of it, which leaves files out without a word."""

from __future__ import annotations

import mimetypes
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..source import DataSource

# Folders in one message.
_NAMED = 5
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def roots(source: DataSource) -> list[Path]:
    """Folders of which an imagefolder is to have every image; none for other sources, and for files that are chosen one by one."""
    if source.name != "imagefolder":
        return []
    if source.data_files is None:
        return [] if source.data_dir is None else [Path(source.data_dir)]
    given = source.data_files.values() if isinstance(source.data_files, Mapping) else [source.data_files]
    patterns = [pattern for item in given for pattern in ([item] if isinstance(item, str) else item)]
    whole = [pattern.removesuffix("**") for pattern in patterns if pattern.endswith("/**")]
    return [Path(source.data_dir or "", pattern) for pattern in whole if "*" not in pattern and "://" not in pattern]


def check_loaded(source: DataSource, opened: Mapping[str, Any]) -> None:
    """Raises ValueError if images of a folder were not loaded: behind a link, or because a class folder was taken for a split.

    Args:
        source: location of the data.
        opened: the loaded splits.
    """
    for root in roots(source):
        folders = list(_walk(root))
        if not folders or any(name in _METADATA or name.endswith(".zip") for _, names in folders for name in names):
            # The rows of these are not the files of the folder.
            continue
        # datasets follows a link to the folder itself.
        loaded = Counter(os.path.dirname(path) for rows in opened.values() for path in _paths(rows, root))
        images = {folder: [name for name in names if _is_image(name)] for folder, names in folders}
        lost = {folder: names for folder, names in images.items() if len(names) > loaded[str(folder)]}
        if lost:
            raise ValueError(_message(root, lost, sum(map(len, images.values())), opened))


def empty_classes(source: DataSource) -> list[str]:
    """Names of the folders beside others with images that have neither files nor folders."""
    return [str(folder.name) for root in roots(source) for folder, names in _walk(root) if not names and not any(folder.iterdir())]


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below ``root`` with the names of its files, links to folders too; hidden ones are left out, as in ``datasets``."""
    seen: set[str] = set()
    for folder, below, names in os.walk(os.path.abspath(root), followlinks=True):
        real = os.path.realpath(folder)
        if real in seen and os.path.realpath(os.path.dirname(folder)).startswith(real):
            # A link to a folder above it.
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _is_image(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")


def _paths(rows: Any, root: Path) -> Iterator[str]:
    """Paths of the images of a split, below ``root`` as it is written."""
    import datasets

    real, written = os.path.realpath(root), os.path.abspath(root)
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            for value in rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))[column]:
                if value is not None and value["path"] is not None:
                    path = os.path.abspath(value["path"])
                    yield written + path[len(real) :] if path.startswith(real + os.sep) else path


def _message(root: Path, lost: Mapping[Path, list[str]], images: int, opened: Mapping[str, Any]) -> str:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    named = ", ".join(str(folder.relative_to(os.path.abspath(root))) for folder in list(lost)[:_NAMED])
    more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    missing = sum(map(len, lost.values()))
    start = f"{missing:,} of {images:,} images below {root} were not loaded, those in {named}{more}"
    if any(_is_linked(folder, root) for folder in lost):
        return f"{start}: datasets does not follow links to folders; put the folders themselves there, or name them one by one in data.data_files"
    endings = sorted({ending for names in lost.values() for name in names if (ending := os.path.splitext(name)[1].lower())})
    if unread := [ending for ending in endings if ending not in ImageFolder.EXTENSIONS]:
        return f"{start}: datasets loads no files that end in {', '.join(unread)}; convert them to PNG or JPEG"
    return (
        f"{start}: where a folder or file has a word such as train, test or validation in its name, datasets takes it for a split (here "
        f"{', '.join(opened)}) and leaves the others out; data.data_files={{train: '{root}/**'}} makes each folder a class"
    )


def _is_linked(folder: Path, root: Path) -> bool:
    return os.path.realpath(folder) != os.path.join(os.path.realpath(root), os.path.relpath(folder, os.path.abspath(root)))
