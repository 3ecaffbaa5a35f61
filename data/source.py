"""Location of a data set and names of its splits. Settings only: this file imports no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Builders of ``datasets`` that read the user's files.
OF_FILES = ("imagefolder", "text", "json", "csv", "parquet")


@dataclass(frozen=True)
class DataSource:
    """Location of a data set.

    Attributes:
        name: hub name, or a packaged builder of ``datasets``: ``imagefolder``, ``parquet``, ``json`` …
        data_dir: folder of the files.
        data_files: file, pattern, list, or a mapping of split to these.
        config: configuration of a hub data set that has several.
        revision: revision of a hub data set.
        image_column: column with the images; None uses the first image column, ``image`` or ``img``.
        label_column: column with the labels; None uses ``label``, ``labels`` or ``fine_label``.
        mask_column: column with one class a pixel; None uses the image column with a usual name.
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
    """Names of the splits of a data set.

    Attributes:
        train: training split.
        validation: validation split; None holds out ``fraction`` of the training rows.
        test: split for the final report; None uses the validation rows.
        fraction: share of the training rows held out if there is no validation split; in (0, 1).
    """

    train: str = "train"
    validation: str | None = None
    test: str | None = None
    fraction: float = 0.1
