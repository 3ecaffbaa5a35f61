"""Splits of images: the embedded digits, or any image data set of Hugging Face ``datasets``."""

from __future__ import annotations

from dataclasses import dataclass

from ..embedded.canvas import Canvas
from ..embedded.scattered_digits import CLASSES, ScatteredDigits
from ..hub import Split, class_names, image_column, label_column, open_splits, split_of
from ..source import DataSource, SplitNames
from ..splits import Splits
from .transform import ImageRows, ImageTransform


@dataclass(frozen=True)
class ImageData(Splits):
    """Splits of images.

    Attributes:
        channels: channels of an image, 1 or 3.
    """

    channels: int = 3


def scattered_digits(canvas: Canvas, train_samples: int, eval_samples: int, seed: int, pixel_labels: bool = False) -> ImageData:
    """Splits of the embedded digits; ``pixel_labels`` gives every pixel a class, with one more class for the background."""
    return ImageData(
        train=ScatteredDigits("train", train_samples, canvas, seed, pixel_labels),
        validation=ScatteredDigits("validation", eval_samples, canvas, pixel_labels=pixel_labels),
        test=ScatteredDigits("test", eval_samples, canvas, pixel_labels=pixel_labels),
        classes=[*(str(digit) for digit in range(CLASSES)), *(["background"] if pixel_labels else [])],
        channels=1,
    )


def hub_images(
    source: DataSource,
    names: SplitNames,
    num_labels: int | None,
    transform: ImageTransform,
    seed: int,
    labelled: bool = True,
) -> ImageData:
    """Splits of any image data set of Hugging Face ``datasets``; ``labelled=False`` ignores its labels.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message lists the existing ones.
    """
    train, validation, test = open_splits(source, names)
    images = image_column(train.features, source.image_column)
    labels = label_column(train.features, source.label_column) if labelled else None
    classes = [] if labels is None else class_names(train, labels)
    if num_labels is not None:
        classes = classes if len(classes) == num_labels else [str(value) for value in range(num_labels)]

    def rows(split: Split, draws: int | None) -> ImageRows:
        return ImageRows(split.rows, images, split.labels, split.bad_labels, transform, draws)

    evaluated = rows(split_of(validation, images, labels, classes), None)
    return ImageData(
        train=rows(split_of(train, images, labels, classes), seed),
        validation=evaluated,
        test=evaluated if test is None else rows(split_of(test, images, labels, classes), None),
        classes=classes,
        channels=transform.channels,
        has_test=test is not None,
    )
