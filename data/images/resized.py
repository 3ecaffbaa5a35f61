"""Images of another size than they are drawn at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from .splits import ImageData


class ResizedImages(Dataset[dict[str, Any]]):
    """Rows whose ``pixel_values`` (channels, side, side) in [0, 1] are resized, bicubic with a filter against aliasing as images from files are.

    Args:
        rows: the rows, which are square images with a label each.
        size: height and width of the resized images.
    """

    def __init__(self, rows: Any, size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._resized(self.rows[index])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several items at once, called by the loader."""
        return [self._resized(item) for item in self.rows.__getitems__(indices)]

    def _resized(self, item: dict[str, Any]) -> dict[str, Any]:
        pixels: Tensor = item["pixel_values"]
        small = interpolate(pixels[None], size=(self.size, self.size), mode="bicubic", antialias=True)[0]
        return {**item, "pixel_values": small.clamp(0, 1)}


def resized(data: ImageData, size: int) -> ImageData:
    """The splits with images of another side, in pixels."""
    train, validation, test = (ResizedImages(rows, size) for rows in (data.train, data.validation, data.test))
    return replace(data, train=train, validation=validation, test=test)
