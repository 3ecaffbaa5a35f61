"""From images of a Hugging Face data set (hub name, imagefolder, parquet) to model inputs."""

from __future__ import annotations

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
from .decoding import Unusable, decode, in_colours
from .random_augment import RandomAugment


@dataclass(frozen=True)
class ImageTransform:
    """Conversion of a decoded image to pixels.

    Attributes:
        size: height and width of the model's input.
        channels: 1 or 3.
        mean: subtracted from each channel of images in [0, 1].
        std: divides each channel.
        augmentation: in training: ``none``, ``flip``, ``crop_flip`` (pad by an eighth, then crop) or ``resized_crop_flip``.
        random_augment: in training: RandAugment; None turns it off.
        erase: in training: probability that a box is replaced by noise.
    """

    size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: str = "none"
    random_augment: RandomAugment | None = None
    erase: float = 0.0

    def __call__(self, image: Image.Image, draws: np.random.Generator | None) -> Tensor:
        """(channels, size, size) float32; no augmentation if ``draws`` is None."""
        return self.with_mask(image, None, draws)[0]

    def with_mask(self, image: Image.Image, mask: Image.Image | None, draws: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """The image and its mask after the same crop, resize and flip.

        Args:
            image: decoded image.
            mask: mask of the same size, one number a pixel, resized to the nearest pixel; None if there is no mask.
            draws: generator of the augmentation; None turns it off. Operations of ``random_augment`` do not change the mask.

        Returns:
            (channels, size, size) float32 pixels and (size, size) int64 mask, empty without a mask.

        Raises:
            Unusable: the image has no certain colours.
        """
        image = in_colours(image, self.channels)
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
        """Resizes the shorter side to ``size``, then crops the centre; sizes are rounded down, as in transformers' image processors."""
        width, height = (int(self.size * side / min(image.size)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.resize((width, height), resampling).crop((left, top, left + self.size, top + self.size))


def _part(size: tuple[int, int], draws: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box of 25 to 100 % of the area with an aspect ratio of 3/4 to 4/3."""
    width, height = size
    area, aspect = width * height * draws.uniform(0.25, 1), np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3)))
    across, down = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
    left, top = int(draws.integers(0, width - across + 1)), int(draws.integers(0, height - down + 1))
    return left, top, left + max(1, across), top + max(1, down)


def _padded(values: np.ndarray, pad: int) -> np.ndarray:
    """(height, width, …) padded by reflection."""
    return np.pad(values, ((pad, pad), (pad, pad), *[(0, 0)] * (values.ndim - 2)), mode="reflect")


class ImageRows(Dataset[dict[str, Any]]):
    """Rows of a Hugging Face data set as model inputs.

    Args:
        rows: the split, its image column cast to undecoded images.
        image_column: name of the column with the images.
        labels: (n,) int64 label of each row, -1 for a bad label; None leaves ``labels`` out of the items.
        bad_labels: reason of each bad label, by row.
        transform: converts an image to pixels.
        seed: seed of the augmentation; None for evaluation.
        mode: mode of the image column's feature.

    An item has ``pixel_values``, ``labels`` and ``sample_ids``; or ``bad``, a BadRow. Index i is row i % n of epoch i // n.
    """

    def __init__(
        self,
        rows: Any,
        image_column: str,
        labels: np.ndarray | None,
        bad_labels: Mapping[int, str],
        transform: ImageTransform,
        seed: int | None,
        mode: str | None = None,
    ) -> None:
        self.rows, self.image_column, self.labels, self.bad_labels = rows, image_column, labels, bad_labels
        self.transform, self.seed, self.mode = transform, seed, mode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self.rows)
        if row in self.bad_labels:
            return {"bad": BadRow(row, self.bad_labels[row])}
        draws = None if self.seed is None else np.random.Generator(np.random.Philox(key=[self.seed, index]))
        try:
            pixels = self.transform(decode(self.rows[row][self.image_column], self.mode), draws)
        except Unusable as error:
            return {"bad": BadRow(row, str(error))}
        except Exception as error:
            # Decoders raise many types of exception; each is counted as a bad row with its type.
            return {"bad": BadRow(row, f"undecodable image ({type(error).__name__})")}
        labels = {} if self.labels is None else {"labels": torch.tensor(int(self.labels[row]))}
        return {"pixel_values": pixels, **labels, "sample_ids": torch.tensor(index)}
