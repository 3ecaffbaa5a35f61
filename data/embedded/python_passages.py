"""The embedded texts to classify: source text of no class with one passage of one package of the standard library inside it.

The label is the package. Only the passage carries the label, and only its words show where it is: a router can drop the surrounding
text once it finds the passage, whereas random selection drops most of the passage. Needs no network and copies nothing.
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

# Packages of every installation that have enough text.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
# Characters of each class, so that the classes are balanced, and characters of the surrounding text.
_OF_CLASS, _AROUND = 170_000, 1_000_000
_LINES = 40
# Length of the passage and of the shortest row, as fractions of the longest row.
PASSAGE, SHORTEST = 1 / 4, 1 / 2


@dataclass(frozen=True)
class Texts:
    """Texts of one split, in pieces of 40 lines.

    Attributes:
        packages: pieces of each class.
        around: pieces of no class, which surround a passage.
    """

    packages: Sequence[Sequence[str]]
    around: Sequence[str]


def library_texts(split: str, root: Path | None = None) -> Texts:
    """Texts of a split. The split of a piece depends on its file name and its number in the file.

    Args:
        split: ``train`` (four fifths of the pieces), ``validation`` or ``test``.
        root: folder of the standard library; None uses the running Python's.

    Raises:
        ValueError: the installation lacks a package, or keeps its library in an archive.
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
            f"{root} has no source of {', '.join(missing)}: data.name = python_passages needs a complete standard library, as files"
        )
    return texts


def _split(draw: float) -> str:
    return "test" if draw < 0.1 else "validation" if draw < 0.2 else "train"


def _pieces(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines), _LINES):
        yield "".join(lines[start : start + _LINES])


class PassageRows(Dataset[dict[str, Any]]):
    """Rows of tokens with one passage each. Index i is row i % n of epoch i // n; a row is the same in every epoch.

    Args:
        packages: (tokens,) int32 token ids of each class.
        around: (tokens,) int32 token ids of no class.
        frame: first and last token id of every row.
        rows: number of rows.
        length: tokens of the longest row.
        seed: seed of the rows.

    An item has ``input_ids`` and ``attention_mask`` (tokens,), ``labels`` and ``sample_ids``.
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
