"""Decodes images as Hugging Face ``datasets`` does, and converts them to colours as transformers' pipelines do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

# Modes with more than 8 bits for each pixel.
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


class Unusable(ValueError):
    """An image or mask whose meaning is not certain; the message is the reason of a bad row."""


def decode(value: Any, mode: str | None = None) -> Image.Image:
    """The image of an undecoded value of an image column, turned as its EXIF orientation says.

    Args:
        value: mapping with ``bytes`` or ``path``, or an image.
        mode: mode of the column's feature; None keeps that of the file.

    Raises:
        ValueError, OSError …: the image cannot be read; decoders raise many types.
    """
    import datasets

    if not isinstance(value, Mapping | Image.Image):
        raise ValueError("empty image")
    image: Image.Image = datasets.Image(mode=mode).decode_example(value)
    return image


def in_colours(image: Image.Image, channels: int) -> Image.Image:
    """The image in RGB or grey, as transformers' pipelines convert it.

    Args:
        image: decoded image of any mode.
        channels: 3 for RGB, 1 for grey.

    Raises:
        Unusable: libraries convert the image in different ways, or lose its content.
    """
    if image.mode in _DEEP:
        numbers = np.asarray(image)
        if image.mode == "F" or int(numbers.min()) < 0 or int(numbers.max()) > 255:
            raise Unusable(f"image of mode {image.mode} with values outside 0 … 255, which are cut off in use: convert it to 8 bits")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        # Pipelines ignore transparency, image processors put the image on white.
        raise Unusable("image with transparent pixels, whose colour is not certain in use: put it on a background")
    colours = image.convert("RGB")
    return colours if channels == 3 else colours.convert("L")


def class_of_pixels(mask: Image.Image) -> np.ndarray:
    """(height, width) int64: the numbers of a mask as they are stored; of a mask with a palette, its indices.

    Raises:
        Unusable: the mask does not hold one whole number for each pixel.
    """
    if len(mask.getbands()) != 1:
        raise Unusable(f"mask of mode {mask.mode}, which has more than one number a pixel")
    if mask.mode == "F":
        raise Unusable("mask of mode F, which holds fractions: store whole numbers, as PNG")
    if mask.format in ("JPEG", "MPO"):
        raise Unusable("mask stored as JPEG, which changes the numbers: store it as PNG")
    return np.asarray(mask).astype(np.int64)
