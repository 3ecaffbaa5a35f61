"""Chats of a training batch, packed into rows by the number of tokens that a language model keeps of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rows import collate, joined


@dataclass(frozen=True)
class ChatPacking:
    """Puts the chats of a batch into as few rows as first-fit decreasing finds; no chat of a row attends to another.

    The kept length of a chat is its text and a share of its visual tokens. Those of a row add up to at most ``length``; one chat alone may
    be longer, since ``data.sequence_length`` limits it with all of its tokens.

    Attributes:
        length: largest kept length of a row.
        placeholders: ids of the tokens that stand for visual ones.
        kept: share of the visual tokens that the layers of the language model process, on average over its layers.
        images_by_row: the processor makes one entry of all images of a row, so that its entries have (1, images, …) values.
    """

    length: int
    placeholders: tuple[int, ...]
    kept: float
    images_by_row: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as of ``collate``, whose rows have ``position_ids`` (0 … in each chat) and ``documents`` (0 … by chat, -1 for padding) in
        place of ``attention_mask``. ``sample_ids`` are those of a row's first chat; kinds of questions are left out."""
        good = [item for item in items if "bad" not in item]
        rows = [self._row([good[number] for number in row]) for row in self.plan([self.kept_length(item) for item in good])]
        return collate([*rows, *(item for item in items if "bad" in item)])

    def kept_length(self, item: Mapping[str, Any]) -> float:
        """Kept length of an encoded chat."""
        ids: Tensor = item["input_ids"]
        visual = int(torch.isin(ids, torch.tensor(self.placeholders)).sum())
        return len(ids) - visual + visual * self.kept

    def plan(self, lengths: Sequence[float]) -> list[list[int]]:
        """The chats of each row by number, in their order, for the kept length of each."""
        rows, room = list[list[int]](), list[float]()
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            # A sum of shares may miss a whole number by rounding.
            row = next((at for at, free in enumerate(room) if lengths[number] <= free + 1e-6), None)
            if row is None:
                rows.append([number])
                room.append(self.length - lengths[number])
            else:
                rows[row].append(number)
                room[row] -= lengths[number]
        return sorted(sorted(row) for row in rows)

    def _row(self, chats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(chat["input_ids"]) for chat in chats]
        names = dict.fromkeys(name for chat in chats for name in chat["images"])
        return {
            **{name: torch.cat([chat[name] for chat in chats]) for name in ("input_ids", "labels", "turns")},
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
            "documents": torch.arange(len(chats)).repeat_interleave(torch.tensor(lengths)),
            "images": {name: self._images([chat["images"][name] for chat in chats if name in chat["images"]]) for name in names},
            "sample_ids": chats[0]["sample_ids"],
            **{name: sum(chat[name] for chat in chats) for name in ("tokens", "predicted")},
            "rows": len(chats),
        }

    def _images(self, values: list[Tensor]) -> Tensor:
        if not self.images_by_row:
            return joined(values)
        return joined([value.transpose(0, 1) for value in values]).transpose(0, 1)
