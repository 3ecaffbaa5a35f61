"""Images with a class for each pixel, through Hugging Face ``datasets``: one column of images, one of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...modules.tokens.labels import IGNORE_PIXEL
from ..hub import check_columns, image_column, mask_column, open_splits, undecoded
from ..rows import BadRow
from ..source import DataSource, SplitNames
from .decoding import Unusable, class_of_pixels, decode
from .splits import ImageData
from .transform import ImageTransform

# Masks whose classes are counted when the data are opened.
COUNTED = 32


class MaskRows(Dataset[dict[str, Any]]):
    """Rows of a Hugging Face data set as inputs of a segmentation model.

    Args:
        rows: the split, both columns cast to undecoded images.
        columns: names of the columns with images and masks.
        classes: number of classes; a mask has values 0 … classes - 1 and ``ignore``.
        ignore: mask value of a pixel without a class.
        transform: converts image and mask to pixels and pixel labels.
        seed: seed of the augmentation; None for evaluation.
        modes: modes of the features of the two columns.

    An item has ``pixel_values``, ``labels`` (size, size) int64 with IGNORE_PIXEL where there is no class, ``sample_ids``, and
    ``predicted``, the number of pixels with a class; or ``bad``, a BadRow. Index i is row i % n of epoch i // n.
    """

    def __init__(
        self,
        rows: Any,
        columns: tuple[str, str],
        classes: int,
        ignore: int,
        transform: ImageTransform,
        seed: int | None,
        modes: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.rows, self.columns, self.classes, self.ignore = rows, columns, classes, ignore
        self.transform, self.seed, self.modes = transform, seed, modes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self.rows)
        draws = None if self.seed is None else np.random.Generator(np.random.Philox(key=[self.seed, index]))
        item = self.rows[row]
        try:
            image, mask = (self._decoded(item, place) for place in (0, 1))
            if mask.size != image.size:
                raise Unusable("mask and image differ in size")
            pixels, labels = self.transform.with_mask(image, Image.fromarray(self._classes(mask)), draws)
        except Unusable as error:
            return {"bad": BadRow(row, str(error))}
        predicted = int((labels != IGNORE_PIXEL).sum())
        return {"pixel_values": pixels, "labels": labels, "sample_ids": torch.tensor(index), "predicted": predicted}

    def count(self, row: int) -> np.ndarray | None:
        """(classes + 1,) pixels of each class in a mask, then those without a class; None for a bad mask."""
        try:
            labels = self._classes(self._decoded(self.rows[row], 1))
        except Unusable:
            return None
        return np.bincount(np.where(labels == IGNORE_PIXEL, self.classes, labels).ravel(), minlength=self.classes + 1)

    def _decoded(self, item: Any, place: int) -> Image.Image:
        try:
            return decode(item[self.columns[place]], self.modes[place])
        except Exception as error:
            # Decoders raise many types of exception; each is counted as a bad row with its type.
            raise Unusable(f"undecodable {('image', 'mask')[place]} ({type(error).__name__})") from None

    def _classes(self, mask: Image.Image) -> np.ndarray:
        """(height, width) uint8 class of each pixel, IGNORE_PIXEL where there is none."""
        numbers = class_of_pixels(mask)
        unlabelled = numbers == self.ignore
        if (((numbers < 0) | (numbers >= self.classes)) & ~unlabelled).any():
            raise Unusable(f"mask value above {self.classes - 1} that is not data.ignore_index")
        if unlabelled.all():
            raise Unusable("mask in which every pixel is data.ignore_index")
        return np.where(unlabelled, IGNORE_PIXEL, numbers).astype(np.uint8)


def hub_masks(
    source: DataSource,
    names: SplitNames,
    classes: int,
    ignore: int,
    transform: ImageTransform,
    seed: int,
) -> ImageData:
    """Splits of any data set of Hugging Face ``datasets`` with one column of images and one of masks.

    Raises:
        ValueError: the source cannot be opened, a split or column is missing (the message lists the existing ones), or all masks of the
            training rows have one class.
    """
    train, validation, test = open_splits(source, names)
    # Mask columns are image columns too: prefer a column with a usual name for images.
    images = image_column(train.features, source.image_column or next((name for name in ("image", "img") if name in train.features), None))
    columns = images, mask_column(train.features, source.mask_column, images)

    check_columns({"train": train, "validation": validation} | ({} if test is None else {"test": test}), columns)

    def rows(split: Any, draws: int | None) -> MaskRows:
        modes: list[str | None] = []
        for column in columns:
            split, mode = undecoded(split, column)
            modes.append(mode)
        return MaskRows(split, columns, classes, ignore, transform, draws, (modes[0], modes[1]))

    evaluated, trained = rows(validation, None), rows(train, seed)
    pixels, looked = _count(trained)
    _check_classes(pixels, looked, classes, ignore)
    return ImageData(
        train=trained,
        validation=evaluated,
        test=evaluated if test is None else rows(test, None),
        classes=[str(value) for value in range(classes)],
        channels=transform.channels,
        has_test=test is not None,
        counts={f"{looked:,} of {len(trained):,} training masks": tuple(pixels[:-1].tolist())} if looked else {},
        unit="pixels",
    )


def _count(rows: MaskRows) -> tuple[np.ndarray, int]:
    """Pixels of each class, then those without a class, over COUNTED masks from all over the split, and more until two classes are found;
    and the number of masks that were counted."""
    total, looked = np.zeros(rows.classes + 1, np.int64), 0
    # The same masks whatever the run's seed.
    for row in np.random.default_rng(0).permutation(len(rows)).tolist():
        if looked >= COUNTED and (total[:-1] > 0).sum() > 1:
            break
        found = rows.count(row)
        if found is not None:
            total, looked = total + found, looked + 1
    return total, looked


def _check_classes(pixels: np.ndarray, looked: int, classes: int, ignore: int) -> None:
    found = np.flatnonzero(pixels[:-1])
    if not looked or len(found) > 1:
        return
    value = int(found[0])
    ignored = (
        f", and {pixels[-1] / pixels.sum():.0%} of the pixels are {ignore}, which is data.ignore_index: pixels without a class. If {ignore} is "
        f"a class, write 0 … {classes - 1} into the masks"
        if pixels[-1]
        else f": masks hold 0 … {classes - 1}, check data.mask_column and the files"
    )
    raise ValueError(f"all {looked:,} training masks have one class, {value}{ignored}")
