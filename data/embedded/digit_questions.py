"""Questions and answers about pictures of handwritten digits. Needs no network.

A picture has two to four digits, all different, each somewhere in its own quarter, and a scrambled digit in half of the pictures with a
free quarter. Most of it is empty, and which part matters depends on the question. A chat about a picture asks for the number of digits
first; then it has two digits read, or two located (one in a picture of two digits), and it asks whether another digit is there, as often as
not whatever the count; in the end it has all quarters listed, or all digits
named with their places. So an answer follows from none before it, except that a digit that was read or
located is not at another place. The digits are those of ``scattered_digits``: no digit is in two splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .canvas import DIGIT, PIECE
from .question_kinds import QUESTIONS
from .scattered_digits import source_digits

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_SPLITS = ("train", "validation", "test")
_LEAST, _MOST = 2, 4


class DigitQuestions(Dataset[dict[str, Any]]):
    """Chats about pictures that are a function of (seed, split, index), as a data set of chats with images has them.

    Args:
        split: ``train``, ``validation`` or ``test``.
        length: number of pictures.
        size: height and width of a picture in pixels; a multiple of 8, at least 16.
        seed: seed of the data set.
        kinds: kinds of questions that are asked; by default all.

    An item has ``images``, a list of one RGB picture, ``messages``, four or five questions with their answers, and ``kinds``, the kind of
    each question.
    """

    def __init__(self, split: str, length: int, size: int = 32, seed: int = 0, kinds: Sequence[str] = QUESTIONS) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split = {split!r} must be one of {', '.join(_SPLITS)}")
        if size % (2 * PIECE) or size < 2 * DIGIT:
            raise ValueError(f"size = {size} must be a multiple of {2 * PIECE}, at least {2 * DIGIT}")
        if not kinds or set(kinds) - set(QUESTIONS):
            raise ValueError(f"data.kinds = {list(kinds)} must be some of {', '.join(QUESTIONS)}")
        self.split, self.length, self.size, self.seed, self.kinds = split, length, size, seed, frozenset(kinds)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = [self.seed * len(_SPLITS) + _SPLITS.index(self.split), index % self.length]
        draws = np.random.Generator(np.random.Philox(key=key))
        images, labels = source_digits(self.split)
        number = int(draws.integers(_LEAST, _MOST + 1))
        quarters = draws.permutation(len(QUARTERS))
        digits = draws.permutation(10)[:number].tolist()
        picture = np.zeros((self.size, self.size), np.float32)
        for digit, quarter in zip(digits, quarters, strict=False):
            self._put(picture, images[draws.choice(np.flatnonzero(labels == digit))], int(quarter), draws)
        if number < len(QUARTERS) and draws.random() < 0.5:
            scrambled = draws.permutation(images[draws.integers(len(labels))].ravel()).reshape(DIGIT, DIGIT)
            self._put(picture, scrambled, int(quarters[number]), draws)
        places = {digit: QUARTERS[quarter] for digit, quarter in zip(digits, quarters, strict=False)}
        one, *others = places
        # Of two digits one is left for presence; of more, two are read or located.
        found = [one, *others[: number - 2]][:2]
        told = [self._either(("reading", "locating"), draws)] * len(found)
        rest = [*zip(told, found, strict=True), ("presence", others[-1])]
        asked = [("counting", one), *(rest[at] for at in draws.permutation(len(rest))), (self._either(("listing", "naming"), draws), one)]
        asked = [(kind, digit) for kind, digit in asked if kind in self.kinds]
        messages: list[dict[str, Any]] = []
        for turn, (kind, digit) in enumerate(asked):
            question, answer = _asked(kind, digit, places, draws)
            content: Any = question if turn else [{"type": "image"}, {"type": "text", "text": question}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        grey = Image.fromarray((picture * 255).round().astype(np.uint8))
        return {"images": [grey.convert("RGB")], "messages": messages, "kinds": [kind for kind, _ in asked]}

    def _either(self, kinds: tuple[str, str], draws: np.random.Generator) -> str:
        """One of two kinds, one that is asked if there is one."""
        drawn = kinds[draws.integers(2)]
        return drawn if drawn in self.kinds else kinds[kinds[0] == drawn]

    def _put(self, picture: np.ndarray, digit: np.ndarray, quarter: int, draws: np.random.Generator) -> None:
        half = self.size // 2
        down, across = PIECE * draws.integers((half - DIGIT) // PIECE + 1, size=2) + half * np.array(divmod(quarter, 2))
        picture[down : down + DIGIT, across : across + DIGIT] = digit


def _asked(kind: str, digit: int, places: dict[int, str], draws: np.random.Generator) -> tuple[str, str]:
    """A question of a kind about one of the digits at these places, and its answer.

    No space is before a digit, so that a tokenizer has one token for it in questions and answers.
    """
    if kind == "reading":
        return f"Which digit is at the {places[digit]}?", str(digit)
    if kind == "counting":
        return "How many digits are there?", str(len(places))
    if kind == "listing":
        held = {quarter: str(one) for one, quarter in places.items()}
        return "What is in each quarter?", ",".join(held.get(quarter, "-") for quarter in QUARTERS)
    if kind == "naming":
        return "Which digits are where?", "\n".join(f"{one} {places[one]}" for one in sorted(places))
    if kind == "locating":
        return f'Where is the "{digit}"?', places[digit]
    if draws.random() < 0.5:
        return f'Is there a "{digit}"?', "yes"
    absent = [other for other in range(10) if other not in places]
    return f'Is there a "{absent[draws.integers(len(absent))]}"?', "no"
