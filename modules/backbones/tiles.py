"""Tile: the visual tokens of one rectangle of an image, as a grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A picture that a tower reads, and the grid of visual tokens that the language model has of it, line after line.

    Attributes:
        pixels: (channels, height, width) the picture.
        rows: number of lines of the grid.
        columns: number of tokens of a line.
        leading: tokens in front of the grid that are of no place, a class token for example.
        line_ends: tokens behind each line that are of no place.
        trailing: tokens behind the grid that are of no place.
        joined: patches along one side of a token, in the tower.
    """

    pixels: Tensor
    rows: int
    columns: int
    leading: int = 0
    line_ends: int = 0
    trailing: int = 0
    joined: int = 1

    @property
    def tokens(self) -> int:
        """Number of all visual tokens of the tile."""
        return self.leading + self.rows * (self.columns + self.line_ends) + self.trailing

    def cells(self, values: Tensor) -> Tensor:
        """(rows, columns) values of the places of the grid, out of (tokens,) those of all tokens."""
        grid = values[self.leading : len(values) - self.trailing]
        return grid.view(self.rows, self.columns + self.line_ends)[:, : self.columns]
