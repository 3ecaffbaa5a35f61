"""The LightningDataModule of image classification."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import lightning
import numpy as np
from torch.utils.data import DataLoader, Dataset

from .hub import Source, Split, class_names, image_column, label_column, open_source, split_of
from .images import ImageRows, ImageTransform, collate
from .loader import EvalBatches, ResumableLoader, StepBatches
from .scattered_digits import CLASSES, Canvas, ScatteredDigits


@dataclass(frozen=True)
class ImageData:
    """Splits ready for loaders.

    Attributes:
        train, validation, test: data sets; ``test`` is ``validation`` where there is no other.
        classes: names of the labels.
        channels: of an image.
        has_test: whether ``test`` is a split of its own.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: list[str] = field(default_factory=list)
    channels: int = 3
    has_test: bool = True


def scattered_digits(canvas: Canvas, train_samples: int, eval_samples: int, seed: int, pixel_labels: bool = False) -> ImageData:
    """The embedded data; with ``pixel_labels`` every pixel has a class, the background one more."""
    return ImageData(
        train=ScatteredDigits("train", train_samples, canvas, seed, pixel_labels),
        validation=ScatteredDigits("validation", eval_samples, canvas, pixel_labels=pixel_labels),
        test=ScatteredDigits("test", eval_samples, canvas, pixel_labels=pixel_labels),
        classes=[*(str(digit) for digit in range(CLASSES)), *(["background"] if pixel_labels else [])],
        channels=1,
    )


def hub_images(
    source: Source,
    train_split: str,
    validation_split: str | None,
    test_split: str | None,
    validation_fraction: float,
    num_labels: int | None,
    transform: ImageTransform,
    seed: int,
    labelled: bool = True,
) -> ImageData:
    """Any image data set of Hugging Face ``datasets``; where ``labelled`` is False its labels, if it has any, are not read.

    Raises:
        ValueError: the source cannot be opened, or a split or column is missing; the message names those there are.
    """
    train, validation, test = open_splits(source, train_split, validation_split, test_split, validation_fraction)
    images = image_column(train.features, source.image_column)
    labels = label_column(train.features, source.label_column) if labelled else None
    names = [] if labels is None else class_names(train, labels)
    if num_labels is not None:
        names = names if len(names) == num_labels else [str(value) for value in range(num_labels)]

    def rows(split: Split, draws: int | None) -> ImageRows:
        return ImageRows(split.rows, images, split.labels, split.bad_labels, transform, draws)

    evaluated = rows(split_of(validation, images, labels, names), None)
    return ImageData(
        train=rows(split_of(train, images, labels, names), seed),
        validation=evaluated,
        test=evaluated if test is None else rows(split_of(test, images, labels, names), None),
        classes=names,
        channels=transform.channels,
        has_test=test is not None,
    )


def open_splits(
    source: Source, train_split: str, validation_split: str | None, test_split: str | None, validation_fraction: float
) -> tuple[Any, Any, Any]:
    """Rows to train on, to validate on, and to report on, or None where there are none of their own.

    Raises:
        ValueError: the source cannot be opened, or a split is missing; the message names those there are.
    """
    opened = open_source(source)
    for key, name in (("train", train_split), ("validation", validation_split), ("test", test_split)):
        if name is not None and name not in opened:
            raise ValueError(f"data.{key}_split = {name!r} does not exist: the splits are {', '.join(opened)}")
    train, test = opened[train_split], None if test_split is None else opened[test_split]
    if validation_split is not None:
        return train, opened[validation_split], test
    # The same rows are held out whatever the seed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(train))
    held_out = max(1, math.floor(validation_fraction * len(train)))
    return train.select(np.sort(order[held_out:])), train.select(np.sort(order[:held_out])), test


class ImageDataModule(lightning.LightningDataModule):
    """Loaders over the splits of image classification.

    Args:
        data: the splits.
        batch_size: training images a step and process.
        eval_batch_size: likewise of validation and test.
        batches: training batches of the whole run on one process.
        workers: loader processes.
        seed: of the order.
    """

    def __init__(self, data: ImageData, batch_size: int, eval_batch_size: int, batches: int, workers: int, seed: int) -> None:
        super().__init__()
        self.data = data
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.batches, self.workers, self.seed = batches, workers, seed

    def train_dataloader(self) -> ResumableLoader:
        length = len(self.data.train)  # type: ignore[arg-type]
        batches = StepBatches(length, self.batch_size, self.batches, self.seed, *self._place())
        return ResumableLoader(self.data.train, batches, **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluated(self.data.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluated(self.data.test)

    def _evaluated(self, rows: Dataset[Any]) -> DataLoader[Any]:
        batches = EvalBatches(len(rows), self.eval_batch_size, *self._place())  # type: ignore[arg-type]
        return DataLoader(rows, batch_sampler=batches, **self._options())

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _options(self) -> dict[str, Any]:
        return {"collate_fn": collate, "num_workers": self.workers, "persistent_workers": self.workers > 0}
