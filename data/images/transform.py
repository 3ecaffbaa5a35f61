"""Any image data set through Hugging Face ``datasets``: hub name, imagefolder, parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..rows import BadRow
from .augmentation import augmented, erase
from .random_augment import RandomAugment


@dataclass(frozen=True)
class ImageTransform:
    """From a decoded image to pixels.

    Attributes:
        size: height and width given to the model.
        channels: 1 or 3.
        mean: subtracted from each channel, images in [0, 1].
        std: divides each channel.
        augmentation: for training: ``none``, ``flip``, ``crop_flip`` (pad by an eighth, crop) or ``resized_crop_flip``.
        random_augment: for training: operations drawn for each image; None applies none.
        erase: for training: probability that a box of noise covers a part.
    """

    size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: str = "none"
    random_augment: RandomAugment | None = None
    erase: float = 0.0

    def __call__(self, image: Image.Image, draws: np.random.Generator | None) -> Tensor:
        """(channels, size, size) float32; without ``draws`` nothing is augmented."""
        return self.with_mask(image, None, draws)[0]

    def with_mask(self, image: Image.Image, mask: Image.Image | None, draws: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """The image and its mask, cut and turned alike.

        Args:
            image: decoded.
            mask: of the same size, one number a pixel, scaled to the nearest; None has none.
            draws: decide the augmentation; None augments nothing. Operations of ``random_augment`` leave the mask as it is.

        Returns:
            (channels, size, size) float32 pixels and (size, size) int64 numbers, which are empty without a mask.
        """
        image = image.convert("RGB" if self.channels == 3 else "L")
        if draws is not None and self.augmentation == "resized_crop_flip":
            box = _part(image.size, draws)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
            mask = None if mask is None else mask.resize((self.size, self.size), Image.Resampling.NEAREST, box=box)
        elif image.size != (self.size, self.size):
            image = self._resize(image, Image.Resampling.BICUBIC)
            mask = None if mask is None else self._resize(mask, Image.Resampling.NEAREST)
        if draws is not None and self.random_augment is not None:
            image = augmented(image, self.random_augment, draws, tuple(round(255 * mean) for mean in self.mean))
        pixels = np.asarray(image, np.float32).reshape(self.size, self.size, self.channels) / 255
        numbers = np.zeros((0, 0), np.int64) if mask is None else np.asarray(mask).astype(np.int64)
        if draws is not None and self.augmentation == "crop_flip":
            pad = max(1, self.size // 8)
            top, left = draws.integers(0, 2 * pad + 1, 2)
            pixels = _padded(pixels, pad)[top : top + self.size, left : left + self.size]
            numbers = numbers if mask is None else _padded(numbers, pad)[top : top + self.size, left : left + self.size]
        if draws is not None and self.augmentation != "none" and draws.random() < 0.5:
            pixels, numbers = pixels[:, ::-1], numbers[:, ::-1]
        normalised = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        if draws is not None and self.erase:
            normalised = erase(normalised, self.erase, draws)
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1), np.float32)), torch.from_numpy(numbers.copy())

    def _resize(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        """Shorter side to ``size``, then the centre."""
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.resize((width, height), resampling).crop((left, top, left + self.size, top + self.size))


def _part(size: tuple[int, int], draws: np.random.Generator) -> tuple[int, int, int, int]:
    """Box of a part of 25 to 100 % of the area and an aspect of 3/4 to 4/3."""
    width, height = size
    area, aspect = width * height * draws.uniform(0.25, 1), np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3)))
    across, down = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
    left, top = int(draws.integers(0, width - across + 1)), int(draws.integers(0, height - down + 1))
    return left, top, left + max(1, across), top + max(1, down)


def _padded(values: np.ndarray, pad: int) -> np.ndarray:
    """(height, width, …) with its border mirrored."""
    return np.pad(values, ((pad, pad), (pad, pad), *[(0, 0)] * (values.ndim - 2)), mode="reflect")


class ImageRows(Dataset[dict[str, Any]]):
    """Rows of a Hugging Face data set as model inputs.

    Args:
        rows: the split, its image column cast to undecoded images.
        image_column: name of the column with the images.
        labels: (n,) int64 label of each row, -1 where it is bad; None leaves ``labels`` out of the items.
        bad_labels: why, by row.
        transform: from image to pixels.
        seed: of the augmentation; None for evaluation.

    An item is ``pixel_values``, ``labels`` and ``sample_ids``, or ``bad``: a BadRow. Index i stands for row i % n of epoch i // n.
    """

    def __init__(
        self,
        rows: Any,
        image_column: str,
        labels: np.ndarray | None,
        bad_labels: Mapping[int, str],
        transform: ImageTransform,
        seed: int | None,
    ) -> None:
        self.rows, self.image_column, self.labels, self.bad_labels = rows, image_column, labels, bad_labels
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self.rows)
        if row in self.bad_labels:
            return {"bad": BadRow(row, self.bad_labels[row])}
        draws = None if self.seed is None else np.random.Generator(np.random.Philox(key=[self.seed, index]))
        try:
            pixels = self.transform(decode(self.rows[row][self.image_column]), draws)
        except Exception as error:
            # Decoders fail in many ways; whichever it is, the row is counted and named.
            return {"bad": BadRow(row, f"undecodable image ({type(error).__name__})")}
        labels = {} if self.labels is None else {"labels": torch.tensor(int(self.labels[row]))}
        return {"pixel_values": pixels, **labels, "sample_ids": torch.tensor(index)}


def decode(value: Any) -> Image.Image:
    """An image of what a data set holds, undecoded. Raises where it cannot be read."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, Mapping) or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("empty image")
    image = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])
    image.load()
    if image.mode.startswith("I;16"):
        # PIL would cut 16-bit grey off at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"unsupported mode {image.mode}")
    return image
