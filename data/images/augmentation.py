"""Random augmentation of images: a few randomly drawn operations for each image, and erased boxes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from .random_augment import STRONGEST, RandomAugment

Colour = tuple[int, ...] | int
Operation = Callable[[Image.Image, float, float, Colour], Image.Image]


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
    def apply(image: Image.Image, strength: float, sign: float, fill: Colour) -> Image.Image:
        coefficients = matrix(strength * sign, image)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)

    return apply


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    # Factor 1 is the unchanged image; the range is 0.1 to 1.9, as in the paper's code.
    return lambda image, strength, sign, fill: kind(image).enhance(1 + 0.9 * strength * sign)


def _rotate(image: Image.Image, strength: float, sign: float, fill: Colour) -> Image.Image:
    return image.rotate(30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=fill)


# Each takes the image, a strength from 0 to 1, a sign and a fill colour. Inversion is left out, as in the paper.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, sign, fill: image,
    "auto_contrast": lambda image, strength, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign, fill: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": lambda image, strength, sign, fill: ImageOps.solarize(image, round(256 * (1 - strength))),
    "posterize": lambda image, strength, sign, fill: ImageOps.posterize(image, 8 - round(4 * strength)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda amount, image: (1, 0.3 * amount, -0.15 * amount * image.height, 0, 1, 0)),
    "shear_y": _affine(lambda amount, image: (1, 0, 0, 0.3 * amount, 1, -0.15 * amount * image.width)),
    "translate_x": _affine(lambda amount, image: (1, 0, 0.45 * amount * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda amount, image: (1, 0, 0, 0, 1, 0.45 * amount * image.height)),
}
NAMES = tuple(OPERATIONS)


def augmented(image: Image.Image, settings: RandomAugment, draws: np.random.Generator, fill: tuple[int, ...]) -> Image.Image:
    """An image of the same size and mode after the random operations of ``settings``.

    Args:
        image: image of mode RGB or L.
        settings: number and strength of the operations.
        draws: generator that selects operations and signs.
        fill: colour of pixels from outside the image, one value a channel.
    """
    colour = fill if image.mode == "RGB" else fill[0]
    for _ in range(settings.operations):
        name = str(draws.choice(NAMES))
        sign = 1.0 if draws.random() < 0.5 else -1.0
        image = OPERATIONS[name](image, settings.magnitude / STRONGEST, sign, colour)
    return image


def erase(pixels: np.ndarray, probability: float, draws: np.random.Generator) -> np.ndarray:
    """Random erasing (arXiv 1708.04896): with ``probability``, noise in a box of 2 to 33 % of the area, aspect 0.3 to 3.3.

    Args:
        pixels: (height, width, channels) float32, normalised; the noise is standard normal.
        probability: probability that a box is erased.
        draws: generator of the decision, the box and the noise.
    """
    if draws.random() >= probability:
        return pixels
    height, width, channels = pixels.shape
    area, aspect = height * width * draws.uniform(0.02, 1 / 3), np.exp(draws.uniform(np.log(0.3), np.log(1 / 0.3)))
    down, across = (
        min(side, max(1, round(length))) for side, length in ((height, (area * aspect) ** 0.5), (width, (area / aspect) ** 0.5))
    )
    top, left = int(draws.integers(0, height - down + 1)), int(draws.integers(0, width - across + 1))
    erased = pixels.copy()
    erased[top : top + down, left : left + across] = draws.standard_normal((down, across, channels), np.float32)
    return erased
