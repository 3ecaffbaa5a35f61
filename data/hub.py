"""Opens data sets with Hugging Face ``datasets`` and checks what can be checked without decoding an image."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .source import OF_FILES, DataSource, SplitNames

_HUB_NAME = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?")


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        rows: the Hugging Face data set, images undecoded.
        labels: (n,) int64, -1 for a bad label; None if labels are not read.
        bad_labels: reason of each bad label, by row.
    """

    rows: Any
    labels: np.ndarray | None
    bad_labels: Mapping[int, str]


def open_source(source: DataSource, **options: Any) -> Any:
    """The ``DatasetDict`` of a source. Raises ValueError with the cause if it cannot be opened.

    Args:
        source: name, files and revision of the data set.
        options: arguments of ``datasets.load_dataset``: ``streaming``, or those of a packaged builder.
    """
    import datasets

    if source.name not in OF_FILES and (not _HUB_NAME.fullmatch(source.name) or Path(source.name).exists()):
        # datasets would read every file below a folder of that name.
        raise ValueError(
            f"data.name = {source.name!r} is no hub name: for files set data.name to {', '.join(OF_FILES)} and data.data_dir or data.data_files"
        )
    datasets.disable_progress_bars()
    files = source.data_files
    plain = (
        files
        if files is None or isinstance(files, str)
        else {k: _as_list(v) for k, v in files.items()}
        if isinstance(files, Mapping)
        else list(files)
    )
    try:
        opened = datasets.load_dataset(
            source.name, source.config, data_dir=source.data_dir, data_files=plain, revision=source.revision, **options
        )
    except Exception as error:
        # datasets raises errors of many types.
        where = source.data_dir or source.data_files or "the hub"
        raise ValueError(
            f"data.name = {source.name!r} cannot be opened from {where}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    return opened


def open_splits(
    source: DataSource, names: SplitNames, counts: Callable[[Mapping[str, Any]], bool] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """Rows for training, validation and test; the test rows are None if no test split is named.

    Args:
        source: name, files and revision of the data set.
        names: names of the splits; without a validation split, rows are held out of the training split.
        counts: predicate for rows to keep; None keeps every row.
        options: arguments of ``open_source``.

    Raises:
        ValueError: the source cannot be opened, a split is missing (the message lists the splits), or there are too few rows.
    """
    opened = named_splits(open_source(source, **options), names)
    train, validation, test = (rows if rows is None or counts is None else rows.filter(counts) for rows in opened)
    if validation is not None:
        return train, validation, test
    # The held-out rows do not depend on the run's seed, so that runs are comparable.
    order = np.random.default_rng(0).permutation(len(train))
    held_out = max(1, math.floor(names.fraction * len(train)))
    if held_out >= len(train):
        raise ValueError(
            f"data.train_split = {names.train!r} has {len(train)} row(s), too few to hold one out for validation: set data.validation_split "
            "and data.data_files={train: …, validation: …}; for text, data.sample_by=paragraph makes more rows of a file"
        )
    return train.select(np.sort(order[held_out:])), train.select(np.sort(order[:held_out])), test


def named_splits(opened: Any, names: SplitNames) -> tuple[Any, Any, Any]:
    """The splits of these names, None for a name of None. Raises ValueError with the existing names if one is missing."""
    for key, name in (("train", names.train), ("validation", names.validation), ("test", names.test)):
        if name is not None and name not in opened:
            raise ValueError(f"data.{key}_split = {name!r} does not exist: the splits are {', '.join(opened)}")
    return opened[names.train], *(None if name is None else opened[name] for name in (names.validation, names.test))


def _as_list(value: str | Sequence[str]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def image_column(features: Mapping[str, Any], requested: str | None) -> str:
    """Name of the column with the images. Raises ValueError with the existing columns if there is none."""
    import datasets

    if requested is not None:
        return _named(features, requested, "data.image_column")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    for name in [*images, "image", "img"]:
        if name in features:
            return name
    raise ValueError(f"no image column found: set data.image_column to one of {', '.join(features)}")


def label_column(features: Mapping[str, Any], requested: str | None) -> str:
    """Name of the column with the labels. Raises ValueError with the existing columns if there is none."""
    if requested is not None:
        return _named(features, requested, "data.label_column")
    for name in ("label", "labels", "fine_label"):
        if name in features:
            return name
    raise ValueError(f"no label column found: set data.label_column to one of {', '.join(features)}")


def mask_column(features: Mapping[str, Any], requested: str | None, images: str) -> str:
    """Name of the column with the masks. Raises ValueError with the existing columns if there is none."""
    import datasets

    if requested is not None:
        return _named(features, requested, "data.mask_column")
    for name in ("mask", "masks", "label", "labels", "annotation", "segmentation", "segmentation_mask"):
        if name != images and isinstance(features.get(name), datasets.Image):
            return name
    raise ValueError(f"no column with masks found: set data.mask_column to one of {', '.join(features)}")


def _named(features: Mapping[str, Any], requested: str, key: str) -> str:
    if requested in features:
        return requested
    near = difflib.get_close_matches(requested, list(features), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key} = {requested!r} is missing from the data: its columns are {', '.join(features)}{hint}")


def class_names(rows: Any, column: str) -> list[str]:
    """Names of the classes: those of a ClassLabel column, else the sorted values of the column."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = {value for value in rows[column] if value is not None}
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values, default=0) + 1)]
    return sorted(map(str, values))


def split_of(rows: Any, images: str, column: str | None, names: Sequence[str]) -> Split:
    """A split with integer labels; a label outside ``names`` is bad. Without ``column`` the split has no labels."""
    import datasets

    if column is None:
        return Split(rows.cast_column(images, datasets.Image(decode=False)), None, {})
    labels, bad = label_codes(rows[column], names)
    return Split(rows.cast_column(images, datasets.Image(decode=False)), labels, bad)


def label_codes(values: Sequence[Any], names: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """(n,) int64 index of each label in ``names``, -1 for a bad label, and the reason of each bad label by row."""
    codes = {name: code for code, name in enumerate(names)}
    labels, bad = np.full(len(values), -1, np.int64), dict[int, str]()
    # Values of a ClassLabel column, and plain integers, are class indices already.
    for row, value in enumerate(values):
        code = value if isinstance(value, int) else codes.get(str(value), -1)
        if value is None:
            bad[row] = "missing label"
        elif 0 <= code < len(names):
            labels[row] = code
        else:
            bad[row] = f"label out of range 0 … {len(names) - 1}" if isinstance(value, int) else "label that no training row has"
    return labels, bad
