"""Scattered digits: one real handwritten digit among clutter on a larger canvas. Needs no network.

The digits are scikit-learn's (1,797 images of 8 × 8, from the UCI optical recognition set). Clutter is made of other digits:
scrambled ones (all 64 pixels permuted) and pieces (a quarter of a digit), so it has the same pixel values. Most patches are empty,
and the brightness of a patch does not show whether it belongs to the digit.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .canvas import DIGIT, PIECE, Canvas

CLASSES = 10
# Class of pixels outside the real digit, clutter included.
BACKGROUND = CLASSES
_TRIES = 12
_SPLITS = {"train": 0, "validation": 1, "test": 2}
_SOURCE_SEED = 20240607
_SOURCE_SHARES = (0.7, 0.85)


@functools.cache
def source_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 8, 8) float32 in [0, 1] and labels (n,) of the digits that a split draws from. No digit is in two splits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SOURCE_SEED).permutation(len(digits.target))
    first, second = (int(share * len(order)) for share in _SOURCE_SHARES)
    chosen = np.split(order, [first, second])[_SPLITS[split]]
    return (digits.images[chosen] / 16).astype(np.float32), digits.target[chosen].astype(np.int64)


class ScatteredDigits(Dataset[dict[str, Tensor]]):
    """Images that are a function of (seed, split, index).

    Args:
        split: ``train``, ``validation`` or ``test``; each has its own source digits.
        length: number of images.
        canvas: size and content of an image.
        seed: seed of the data set.
        pixel_labels: label each pixel instead of each image.
        channels: channels of an image, all the same.

    An item has ``pixel_values`` (channels, size, size) float32 in [0, 1], ``labels`` and ``sample_ids`` int64 scalars, and ``place``
    int64 (2,): row and column of the digit's top left corner in pixels. With ``pixel_labels``, ``labels`` are (size, size) int64:
    the digit's class in its whole square of 8 × 8 pixels, and BACKGROUND elsewhere. The images are the same.
    """

    classes = tuple(str(digit) for digit in range(CLASSES))

    def __init__(
        self, split: str, length: int, canvas: Canvas | None = None, seed: int = 0, pixel_labels: bool = False, channels: int = 1
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split = {split!r} must be one of {', '.join(_SPLITS)}")
        self.split, self.length, self.seed, self.pixel_labels, self.channels = split, length, seed, pixel_labels, channels
        self.canvas = canvas or Canvas()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Several items at once, called by the loader: numpy then works on whole batches."""
        images, labels, places = self._draw(np.asarray(indices) % self.length)
        if self.pixel_labels:
            labels = _pixel_labels(labels, places, self.canvas.size)
        rows = zip(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(places), indices, strict=True)
        return [
            {"pixel_values": image.expand(self.channels, -1, -1), "labels": label, "place": place, "sample_ids": torch.tensor(index)}
            for image, label, place, index in rows
        ]

    def _draw(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        canvas, sources = self.canvas, source_digits(self.split)
        objects = 1 + canvas.scrambled + canvas.pieces
        per_object = 1 + 2 * _TRIES
        # One generator for each image: an image does not depend on the batch it is drawn in.
        width = objects * per_object + canvas.scrambled * DIGIT**2 + canvas.pieces
        draws = np.stack(
            [np.random.Generator(np.random.Philox(key=[self.seed * 4 + _SPLITS[self.split], i])).random(width) for i in indices]
        )
        choices = draws[:, : objects * per_object].reshape(-1, objects, per_object)
        permutations = draws[:, objects * per_object : width - canvas.pieces].reshape(len(indices), canvas.scrambled, DIGIT**2)
        quarters = (draws[:, width - canvas.pieces :] * 4).astype(np.int64)

        number = len(indices)
        images = np.zeros((number, canvas.size, canvas.size), np.float32)
        taken = np.zeros((number, canvas.size // PIECE, canvas.size // PIECE), bool)
        rows = np.arange(number)
        labels = places = np.empty(0)
        for item in range(objects):
            which = (choices[:, item, 0] * len(sources[1])).astype(np.int64)
            picture = sources[0][which]
            if item == 0:
                labels = sources[1][which]
            elif item <= canvas.scrambled:
                order = permutations[:, item - 1].argsort(-1)
                picture = np.take_along_axis(picture.reshape(number, -1), order, 1).reshape(number, DIGIT, DIGIT)
            else:
                quarter = quarters[:, item - 1 - canvas.scrambled]
                pieces = picture.reshape(number, 2, PIECE, 2, PIECE).transpose(0, 1, 3, 2, 4).reshape(number, 4, PIECE, PIECE)
                picture = pieces[rows, quarter]
            place, fits = _free_place(taken, picture.shape[1] // PIECE, choices[:, item, 1:].reshape(number, _TRIES, 2))
            if item == 0:
                places = place * PIECE
            _paste(images, taken, picture, place, fits)
        return images, labels, places.astype(np.int64)


def _pixel_labels(labels: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """(n, size, size) int64 class of each pixel, from the digits (n,) and the corners (n, 2) of their squares."""
    pixels = np.arange(size)
    inside = [(pixels >= start[:, None]) & (pixels < start[:, None] + DIGIT) for start in places.T]
    return np.where(inside[0][:, :, None] & inside[1][:, None, :], labels[:, None, None], BACKGROUND).astype(np.int64)


def _free_place(taken: np.ndarray, cells: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First of the drawn places (n, 2), in cells, where a square of ``cells`` overlaps nothing, and whether there is one."""
    number, grid, _ = taken.shape
    candidates = (draws * (grid - cells + 1)).astype(np.int64)
    rows = np.arange(number)[:, None]
    free = np.ones(candidates.shape[:2], bool)
    for down in range(cells):
        for across in range(cells):
            free &= ~taken[rows, candidates[..., 0] + down, candidates[..., 1] + across]
    first = free.argmax(1)
    return candidates[np.arange(number), first], free.any(1)


def _paste(images: np.ndarray, taken: np.ndarray, picture: np.ndarray, place: np.ndarray, fits: np.ndarray) -> None:
    rows = np.flatnonzero(fits)[:, None, None]
    size = picture.shape[1]
    pixels = np.arange(size)
    top, left = place[fits, 0][:, None, None], place[fits, 1][:, None, None]
    images[rows, top * PIECE + pixels[:, None], left * PIECE + pixels] = picture[fits]
    cells = np.arange(size // PIECE)
    taken[rows, top + cells[:, None], left + cells] = True
