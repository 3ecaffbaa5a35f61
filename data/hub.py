"""Opens data sets with Hugging Face ``datasets`` and checks what can be checked without decoding an image."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .images.folders import check_loaded
from .source import OF_FILES, DataSource, SplitNames
from .text.files import named_faults

_HUB_NAME = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?")


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
    with named_faults(source):
        opened = datasets.load_dataset(
            source.name, source.config, data_dir=source.data_dir, data_files=plain, revision=source.revision, **options
        )
    check_loaded(source, opened)
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


def check_columns(splits: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Raises ValueError if a split lacks one of the columns that were found in the training split."""
    for split, rows in splits.items():
        for column in columns:
            if column not in rows.features:
                raise ValueError(
                    f"the rows for {split} have no column {column!r}, which those for training have: their columns are "
                    f"{', '.join(rows.features)}; use the same names in all splits"
                )


def undecoded(rows: Any, column: str) -> tuple[Any, str | None]:
    """The rows with undecoded images in a column, and the mode that its feature converts images to.

    Raises:
        ValueError: the column does not hold images.
    """
    import datasets
    import pyarrow

    feature = rows.features[column]
    mode = feature.mode if isinstance(feature, datasets.Image) else None
    try:
        return rows.cast_column(column, datasets.Image(decode=False)), mode
    except (TypeError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"column {column!r} holds {feature}, not images ({error}): set data.image_column to a column with images"
        ) from None
