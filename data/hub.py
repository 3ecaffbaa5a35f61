"""Opening a data set with Hugging Face ``datasets``, and checking what can be checked without decoding an image."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .source import DataSource, SplitNames


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        rows: the Hugging Face data set, images undecoded.
        labels: (n,) int64, -1 where the label is bad; None where no label is wanted.
        bad_labels: why, by row.
    """

    rows: Any
    labels: np.ndarray | None
    bad_labels: Mapping[int, str]


def open_source(source: DataSource, **options: Any) -> Any:
    """The ``DatasetDict``. Raises ValueError with what to do when it cannot be opened.

    Args:
        source: where the rows come from.
        options: of ``datasets.load_dataset``: ``streaming``, or those of a packaged builder.
    """
    import datasets

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
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        where = source.data_dir or source.data_files or "the hub"
        raise ValueError(f"data.name = {source.name!r} cannot be opened from {where}: {error}") from None
    return opened


def open_splits(
    source: DataSource, names: SplitNames, counts: Callable[[Mapping[str, Any]], bool] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """Rows to train on, to validate on, and to report on, or None where there are none of their own.

    Args:
        source: where the rows come from.
        names: of the splits; rows are held out of the training split where there is none to validate on.
        counts: whether a row is one at all; None takes every row.
        options: of ``open_source``.

    Raises:
        ValueError: the source cannot be opened, a split is missing (the message names those there are), or rows are too few to hold some out.
    """
    opened = named_splits(open_source(source, **options), names)
    train, validation, test = (rows if rows is None or counts is None else rows.filter(counts) for rows in opened)
    if validation is not None:
        return train, validation, test
    # The same rows are held out whatever the seed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(train))
    held_out = max(1, math.floor(names.fraction * len(train)))
    if held_out >= len(train):
        raise ValueError(
            f"data.train_split = {names.train!r} has {len(train)} row(s), too few to hold one out for validation: give data.validation_split "
            "and data.data_files={train: …, validation: …}; for text, data.sample_by=paragraph makes more rows of a file"
        )
    return train.select(np.sort(order[held_out:])), train.select(np.sort(order[:held_out])), test


def named_splits(opened: Any, names: SplitNames) -> tuple[Any, Any, Any]:
    """The splits of those names, None where no name is given. Raises ValueError naming those there are."""
    for key, name in (("train", names.train), ("validation", names.validation), ("test", names.test)):
        if name is not None and name not in opened:
            raise ValueError(f"data.{key}_split = {name!r} does not exist: the splits are {', '.join(opened)}")
    return opened[names.train], *(None if name is None else opened[name] for name in (names.validation, names.test))


def _as_list(value: str | Sequence[str]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def image_column(features: Mapping[str, Any], wanted: str | None) -> str:
    """The column with the images. Raises ValueError naming the columns there are."""
    import datasets

    if wanted is not None:
        return _named(features, wanted, "data.image_column")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    for name in [*images, "image", "img"]:
        if name in features:
            return name
    raise ValueError(f"no image column found: set data.image_column to one of {', '.join(features)}")


def label_column(features: Mapping[str, Any], wanted: str | None) -> str:
    """The column with the labels. Raises ValueError naming the columns there are."""
    if wanted is not None:
        return _named(features, wanted, "data.label_column")
    for name in ("label", "labels", "fine_label"):
        if name in features:
            return name
    raise ValueError(f"no label column found: set data.label_column to one of {', '.join(features)}")


def mask_column(features: Mapping[str, Any], wanted: str | None, images: str) -> str:
    """The column with the masks. Raises ValueError naming the columns there are."""
    import datasets

    if wanted is not None:
        return _named(features, wanted, "data.mask_column")
    for name in ("mask", "masks", "label", "labels", "annotation", "segmentation", "segmentation_mask"):
        if name != images and isinstance(features.get(name), datasets.Image):
            return name
    raise ValueError(f"no column with masks found: set data.mask_column to one of {', '.join(features)}")


def _named(features: Mapping[str, Any], wanted: str, key: str) -> str:
    if wanted in features:
        return wanted
    near = difflib.get_close_matches(wanted, list(features), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key} = {wanted!r} is missing from the data: its columns are {', '.join(features)}{hint}")


def class_names(rows: Any, column: str) -> list[str]:
    """Names of the classes: of a ClassLabel, or the values there are, in order."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = {value for value in rows[column] if value is not None}
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values, default=0) + 1)]
    return sorted(map(str, values))


def split_of(rows: Any, images: str, column: str | None, names: Sequence[str]) -> Split:
    """A split with its labels as numbers; a label that is none of ``names`` is bad. Without a column it has none."""
    import datasets

    if column is None:
        return Split(rows.cast_column(images, datasets.Image(decode=False)), None, {})
    labels, bad = label_codes(rows[column], names)
    return Split(rows.cast_column(images, datasets.Image(decode=False)), labels, bad)


def label_codes(values: Sequence[Any], names: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """(n,) int64 number of each label, -1 where it is bad, and why by row: it is none of ``names``."""
    codes = {name: code for code, name in enumerate(names)}
    labels, bad = np.full(len(values), -1, np.int64), dict[int, str]()
    # Of a ClassLabel column, and of plain integers, the number is the code.
    for row, value in enumerate(values):
        code = value if isinstance(value, int) else codes.get(str(value), -1)
        if value is None:
            bad[row] = "missing label"
        elif 0 <= code < len(names):
            labels[row] = code
        else:
            bad[row] = f"label out of range 0 … {len(names) - 1}" if isinstance(value, int) else "label that no training row has"
    return labels, bad
