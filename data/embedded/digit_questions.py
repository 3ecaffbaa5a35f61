"""Questions and answers about pictures of handwritten digits. Needs no network.

A picture has two to four digits, all different, each somewhere in its own quarter, and a scrambled digit in half of the pictures with a
free quarter. Most of it is empty, and which part matters depends on the question. Each picture has three questions: reading or locating
of one digit, counting, and presence, which asks for another digit that is there as often as not, whatever the count, so that no answer shows
another. The digits are those of ``scattered_digits``: no digit is in two splits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .canvas import DIGIT
from .scattered_digits import source_digits

QUESTIONS = ("reading", "counting", "locating", "presence")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_SPLITS = ("train", "validation", "test")
_LEAST, _MOST = 2, 4


class DigitQuestions(Dataset[dict[str, Any]]):
    """Chats about pictures that are a function of (seed, split, index), as a data set of chats with images has them.

    Args:
        split: ``train``, ``validation`` or ``test``.
        length: number of pictures.
        size: height and width of a picture in pixels; a multiple of 2, at least 32.
        scale: pixels of a picture for each pixel of a digit.
        seed: seed of the data set.

    An item has ``images``, a list of one RGB picture, ``messages``, three questions with their answers in a random order, and ``kinds``, the
    kind of each question.
    """

    def __init__(self, split: str, length: int, size: int = 48, scale: int = 2, seed: int = 0) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split = {split!r} must be one of {', '.join(_SPLITS)}")
        if size % 2 or size < 2 * DIGIT * scale:
            raise ValueError(
                f"digit_questions: the image_size of the model's vision_config is {size}: it must be even and at least {2 * DIGIT * scale}"
            )
        self.split, self.length, self.size, self.scale, self.seed = split, length, size, scale, seed

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
        asked = [("reading", "locating")[draws.integers(2)], "counting", "presence"]
        kinds = [asked[kind] for kind in draws.permutation(len(asked))]
        messages: list[dict[str, Any]] = []
        for turn, kind in enumerate(kinds):
            question, answer = _asked(kind, places, draws)
            content: Any = question if turn else [{"type": "image"}, {"type": "text", "text": question}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        grey = Image.fromarray((picture * 255).round().astype(np.uint8))
        return {"images": [grey.convert("RGB")], "messages": messages, "kinds": kinds}

    def _put(self, picture: np.ndarray, digit: np.ndarray, quarter: int, draws: np.random.Generator) -> None:
        half, large = self.size // 2, digit.repeat(self.scale, 0).repeat(self.scale, 1)
        down, across = draws.integers(half - len(large) + 1, size=2) + half * np.array(divmod(quarter, 2))
        picture[down : down + len(large), across : across + len(large)] = large


def _asked(kind: str, places: dict[int, str], draws: np.random.Generator) -> tuple[str, str]:
    """A question of a kind about digits at these places, and its answer."""
    one, other, *_ = places
    if kind == "reading":
        return f"Which digit is at the {places[one]}?", str(one)
    if kind == "counting":
        return "How many digits are there?", str(len(places))
    if kind == "locating":
        return f"Where is the {one}?", places[one]
    if draws.random() < 0.5:
        return f"Is there a {other}?", "yes"
    absent = [digit for digit in range(10) if digit not in places]
    return f"Is there a {absent[draws.integers(len(absent))]}?", "no"
