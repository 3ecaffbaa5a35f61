"""Images with a class for each pixel, through Hugging Face ``datasets``: one column of images, one of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...modules.tokens.labels import IGNORE_PIXEL
from ..hub import image_column, mask_column, open_splits
from ..rows import BadRow
from ..source import DataSource, SplitNames
from .splits import ImageData
from .transform import ImageTransform, decode


class MaskRows(Dataset[dict[str, Any]]):
    """Rows of a Hugging Face data set as inputs of a segmentation model.

    Args:
        rows: the split, both columns cast to undecoded images.
        columns: names of the columns with images and masks.
        classes: number of classes; a mask has values 0 … classes - 1 and ``ignore``.
        ignore: mask value of a pixel without a class.
        transform: converts image and mask to pixels and pixel labels.
        seed: seed of the augmentation; None for evaluation.

    An item has ``pixel_values``, ``labels`` (size, size) int64 with IGNORE_PIXEL where there is no class, ``sample_ids``, and
    ``predicted``, the number of pixels with a class; or ``bad``, a BadRow. Index i is row i % n of epoch i // n.
    """

    def __init__(self, rows: Any, columns: tuple[str, str], classes: int, ignore: int, transform: ImageTransform, seed: int | None) -> None:
        self.rows, self.columns, self.classes, self.ignore = rows, columns, classes, ignore
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self.rows)
        draws = None if self.seed is None else np.random.Generator(np.random.Philox(key=[self.seed, index]))
        item, decoded = self.rows[row], []
        for kind, column in zip(("image", "mask"), self.columns, strict=True):
            try:
                decoded.append(decode(item[column]))
            except Exception as error:
                # Decoders raise many types of exception; each is counted as a bad row with its type.
                return {"bad": BadRow(row, f"undecodable {kind} ({type(error).__name__})")}
        image, mask = decoded
        if len(mask.getbands()) != 1:
            return {"bad": BadRow(row, f"mask of mode {mask.mode}, which has more than one number a pixel")}
        if mask.size != image.size:
            return {"bad": BadRow(row, "mask and image differ in size")}
        numbers = np.asarray(mask).astype(np.int64)
        unlabelled = numbers == self.ignore
        if ((numbers >= self.classes) & ~unlabelled).any():
            return {"bad": BadRow(row, f"mask value above {self.classes - 1} that is not data.ignore_index")}
        pixels, labels = self.transform.with_mask(
            image, Image.fromarray(np.where(unlabelled, IGNORE_PIXEL, numbers).astype(np.uint8)), draws
        )
        predicted = int((labels != IGNORE_PIXEL).sum())
        return {"pixel_values": pixels, "labels": labels, "sample_ids": torch.tensor(index), "predicted": predicted}


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
        ValueError: the source cannot be opened, or a split or column is missing; the message lists the existing ones.
    """
    import datasets

    train, validation, test = open_splits(source, names)
    # Mask columns are image columns too: prefer a column with a usual name for images.
    images = image_column(train.features, source.image_column or next((name for name in ("image", "img") if name in train.features), None))
    columns = images, mask_column(train.features, source.mask_column, images)

    def rows(split: Any, draws: int | None) -> MaskRows:
        for column in columns:
            split = split.cast_column(column, datasets.Image(decode=False))
        return MaskRows(split, columns, classes, ignore, transform, draws)

    evaluated = rows(validation, None)
    return ImageData(
        train=rows(train, seed),
        validation=evaluated,
        test=evaluated if test is None else rows(test, None),
        classes=[str(value) for value in range(classes)],
        channels=transform.channels,
        has_test=test is not None,
    )
