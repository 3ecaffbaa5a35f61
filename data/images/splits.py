"""Splits of images: the embedded digits, or any image data set of Hugging Face ``datasets``."""

from __future__ import annotations

from dataclasses import dataclass

from ..embedded.canvas import Canvas
from ..embedded.scattered_digits import CLASSES, ScatteredDigits
from ..hub import check_columns, image_column, label_column, open_splits, undecoded
from ..labels.classes import KnownClasses, read_labels
from ..rows import BadRow, BadRowCount
from ..source import DataSource, SplitNames
from ..splits import Splits
from .folders import empty_classes
from .transform import ImageRows, ImageTransform


@dataclass(frozen=True)
class ImageData(Splits):
    """Splits of images.

    Attributes:
        channels: channels of an image, 1 or 3.
    """

    channels: int = 3


def scattered_digits(
    canvas: Canvas, train_samples: int, eval_samples: int, seed: int, channels: int, pixel_labels: bool = False
) -> ImageData:
    """Splits of the embedded digits; ``pixel_labels`` gives every pixel a class, with one more class for the background."""
    return ImageData(
        train=ScatteredDigits("train", train_samples, canvas, seed, pixel_labels, channels),
        validation=ScatteredDigits("validation", eval_samples, canvas, 0, pixel_labels, channels),
        test=ScatteredDigits("test", eval_samples, canvas, 0, pixel_labels, channels),
        classes=[*(str(digit) for digit in range(CLASSES)), *(["background"] if pixel_labels else [])],
        channels=channels,
    )


def hub_images(
    source: DataSource,
    names: SplitNames,
    num_labels: int | None,
    transform: ImageTransform,
    seed: int,
    max_bad_fraction: float,
    known: KnownClasses | None = None,
    labelled: bool = True,
) -> ImageData:
    """Splits of any image data set of Hugging Face ``datasets``.

    Args:
        source: name, files and columns of the data set.
        names: names of the splits.
        num_labels: number of classes; None counts them.
        transform: converts an image to pixels.
        seed: seed of the augmentation.
        max_bad_fraction: allowed share of bad labels in each split.
        known: classes of the model that is evaluated or continues to train; None if it has none.
        labelled: False ignores the labels.

    Raises:
        ValueError: the source cannot be opened, a split or column is missing (the message lists the existing ones), or the labels cannot
            be used.
        BadRows: the share of bad labels in a split exceeds ``max_bad_fraction``.
    """
    train, validation, test = open_splits(source, names)
    images = image_column(train.features, source.image_column)
    opened = {"train": train, "validation": validation} | ({} if test is None else {"test": test})
    label = label_column(train.features, source.label_column) if labelled else None
    check_columns(opened, [images, *([] if label is None else [label])])
    labels = None
    if label is not None:
        # Without a split for validation its rows were taken from the training rows, and their classes with them.
        sources = ("train", "validation") if names.validation is None else ("train",)
        labels = read_labels(opened, label, sources, num_labels, known)
        for split, bad in labels.bad.items():
            BadRowCount(max_bad_fraction, len(opened[split])).add(len(opened[split]), [BadRow(row, bad[row]) for row in sorted(bad)])

    def rows(split: str, draws: int | None) -> ImageRows:
        raw, mode = undecoded(opened[split], images)
        numbers, bad = (None, {}) if labels is None else (labels.numbers[split], labels.bad[split])
        return ImageRows(raw, images, numbers, bad, transform, draws, mode)

    evaluated = rows("validation", None)
    return ImageData(
        train=rows("train", seed),
        validation=evaluated,
        test=evaluated if test is None else rows("test", None),
        classes=[] if labels is None else labels.classes,
        channels=transform.channels,
        has_test=test is not None,
        counts={} if labels is None else labels.counts,
        notes=[f"class {name}: 0 rows, its folder is empty" for name in empty_classes(source)] if labelled else [],
    )
