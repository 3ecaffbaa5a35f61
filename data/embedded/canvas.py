"""Settings of one image of scattered digits; ``scattered_digits.py`` draws it."""

from __future__ import annotations

from dataclasses import dataclass

# Side of a digit and side of a piece of a digit, in pixels.
DIGIT, PIECE = 8, 4


@dataclass(frozen=True)
class Canvas:
    """Size and content of one image.

    Attributes:
        size: height and width in pixels; a multiple of 4.
        scrambled: number of scrambled digits.
        pieces: number of digit quarters.
    """

    size: int = 32
    scrambled: int = 8
    pieces: int = 2

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where a recipe holds a canvas

    def __post_init__(self) -> None:
        if self.size % PIECE or self.size < 2 * DIGIT:
            raise ValueError(f"data.canvas.size = {self.size} must be a multiple of {PIECE} and at least {2 * DIGIT} pixels")
        if self.scrambled < 0 or self.pieces < 0:
            raise ValueError("data.canvas.scrambled and data.canvas.pieces must be at least 0")
        if (1 + self.scrambled) * 4 + self.pieces > (self.size // PIECE) ** 2 * 3 // 4:
            raise ValueError(f"data.canvas: {self.scrambled} scrambled digits and {self.pieces} pieces do not fit in {self.size} pixels")
