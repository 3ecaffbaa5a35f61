"""Where the rows of a data set come from, and which of its splits are read. Settings alone: no library is needed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DataSource:
    """Where rows come from.

    Attributes:
        name: hub name, or a packaged builder of ``datasets``: ``imagefolder``, ``parquet``, ``json`` …
        data_dir: folder of the files.
        data_files: file, pattern, list, or either by split.
        config: configuration of a hub data set that has several.
        revision: of a hub data set.
        image_column: column with the images; None takes the only image column, or ``image``, ``img``.
        label_column: column with the labels; None takes ``label``, ``labels``, ``fine_label``.
        mask_column: column with a class for each pixel; None takes the image column of a usual name.
    """

    name: str
    data_dir: str | None = None
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    mask_column: str | None = None


@dataclass(frozen=True)
class SplitNames:
    """Which splits of a data set are read.

    Attributes:
        train: to train on.
        validation: to validate on; None holds out ``fraction`` of the training rows.
        test: to report on; None reports on validation.
        fraction: of the training rows, held out where there is no validation split; in (0, 1).
    """

    train: str = "train"
    validation: str | None = None
    test: str | None = None
    fraction: float = 0.1
