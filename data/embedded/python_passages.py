"""The embedded texts to classify: somewhere in source that belongs to no class stands a passage of one package of the standard library.

Which package is the label. Only the passage tells, and nothing but its words says where it stands: a router that finds it leaves the
rest out, and one that draws at random leaves most of it out. Needs no network, and nothing of it is copied here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .python_library import SPLITS, draw_of, text_files

# In every installation, and each with text enough.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
# Characters of a class, so that all have as many, and of what stands around passages.
_OF_CLASS, _AROUND = 170_000, 1_000_000
_LINES = 40
# Of the longest row: how much is the passage, and how long the shortest row is.
PASSAGE, SHORTEST = 1 / 4, 1 / 2


@dataclass(frozen=True)
class Texts:
    """Texts of one split.

    Attributes:
        packages: those of each class, pieces of 40 lines.
        around: those of no class.
    """

    packages: Sequence[Sequence[str]]
    around: Sequence[str]


def library_texts(split: str, root: Path | None = None) -> Texts:
    """Texts of a split; each piece of a file is in one split, by its name and number alone.

    Args:
        split: ``train`` (four fifths of the pieces), ``validation`` or ``test``.
        root: folder of the library; None takes the running Python's.

    Raises:
        ValueError: the installation lacks a package, or has its library in an archive.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r} must be one of {', '.join(SPLITS)}")
    root = root or Path(os.__file__).parent
    files = sorted((draw_of(name), name, path) for name, path in text_files(root) if path.suffix == ".py")

    def pieces(package: str | None, most: int) -> list[str]:
        found, characters = [], 0
        for _, name, path in files:
            first, inside, _ = name.partition("/")
            if (first if inside else None) != package or characters >= most:
                continue
            for number, piece in enumerate(_pieces(path.read_text("utf-8", "replace"))):
                characters += len(piece)
                if _split(draw_of(f"{name} {number}")) == split:
                    found.append(piece)
        return found

    texts = Texts([pieces(package, _OF_CLASS) for package in PACKAGES], pieces(None, _AROUND))
    if missing := [name for name, found in zip(PACKAGES, texts.packages, strict=True) if not found]:
        raise ValueError(
            f"{root} has no source of {', '.join(missing)}: data.name = python_passages needs a whole standard library, as files"
        )
    return texts


def _split(draw: float) -> str:
    return "test" if draw < 0.1 else "validation" if draw < 0.2 else "train"


def _pieces(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines), _LINES):
        yield "".join(lines[start : start + _LINES])


class PassageRows(Dataset[dict[str, Any]]):
    """Rows of tokens with one passage each. Index i stands for row i % n of epoch i // n; a row is the same in each.

    Args:
        packages: (tokens,) int32 token ids of each class.
        around: (tokens,) int32 of no class.
        frame: token ids in front of and behind every row.
        rows: how many there are.
        length: tokens of the longest row.
        seed: of the rows.

    An item is ``input_ids``, ``attention_mask`` (n,), ``labels`` and ``sample_ids``.
    """

    def __init__(
        self, packages: Sequence[np.ndarray], around: np.ndarray, frame: tuple[int, int], rows: int, length: int, seed: int
    ) -> None:
        self.packages, self.around, self.frame, self.seed = packages, around, frame, seed
        self.passage = max(4, round(PASSAGE * length))
        self.lengths = torch.from_numpy(np.random.default_rng(seed).integers(round(SHORTEST * length), length + 1, rows))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self)
        draws = np.random.Generator(np.random.Philox(key=[self.seed, row]))
        label = int(draws.integers(len(self.packages)))
        passage = _cut(self.packages[label], self.passage, draws)
        around = _cut(self.around, int(self.lengths[row]) - len(self.frame) - self.passage, draws)
        before = int(draws.integers(len(around) + 1))
        ids = np.concatenate([[self.frame[0]], around[:before], passage, around[before:], [self.frame[1]]]).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "labels": torch.tensor(label),
            "sample_ids": torch.tensor(index),
        }


def _cut(tokens: np.ndarray, length: int, draws: np.random.Generator) -> np.ndarray:
    start = int(draws.integers(len(tokens) - length + 1))
    return tokens[start : start + length]
