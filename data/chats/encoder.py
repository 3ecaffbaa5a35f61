"""From a chat with images to what a model reads: token ids with the places of visual tokens, learned tokens, and pixels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...modules.tokens.labels import IGNORE_TOKEN
from ..text.columns import TextColumns
from ..text.conversations import WrongRow
from ..text.documents import Encoder

# Documents are cut here, where a row is too long instead.
_UNCUT = 10**9


@dataclass(frozen=True)
class Images:
    """The images of a row.

    Attributes:
        tokens: the token ids that stand for each image, from its processor.
        pixels: (channels, height, width) float32 of each image.
    """

    tokens: list[list[int]]
    pixels: list[Tensor]


class ChatEncoder:
    """Encodes chats with the processor of a vision-language model.

    The text of a chat is that of the processor's template, with one placeholder for an image. What stands for an image in the end (as many
    placeholders as it has visual tokens, and what a family puts around them) is what the processor makes of the placeholder alone.

    Args:
        processor: processor of transformers with an image processor, a tokenizer, an ``image_token`` and a chat template.
        limit: largest number of tokens of a row, those of images included.

    Raises:
        ValueError: the processor lacks one of these.
    """

    def __init__(self, processor: Any, limit: int) -> None:
        lacking = [name for name in ("image_processor", "tokenizer", "image_token") if getattr(processor, name, None) is None]
        if lacking:
            raise ValueError(f"the processor {type(processor).__name__} has no {', '.join(lacking)}: it is not one of a supported family")
        template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        if not template:
            raise ValueError("the processor has no chat template: set data.chat_template to a Jinja template")
        self.processor, self.limit = processor, limit
        self.tokenizer = copy.copy(processor.tokenizer)
        self.tokenizer.chat_template = template
        self.placeholder: int = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._text = Encoder(self.tokenizer, TextColumns(chat="messages", chats=True), _UNCUT)

    def __call__(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Encodes one chat.

        Args:
            messages: messages with parts of type ``image`` and ``text``.
            images: the images of its parts, in their order.

        Returns:
            ``input_ids``, ``labels`` (IGNORE_TOKEN where nothing is learned), ``attention_mask`` and ``turns`` (number of the answer that a
            learned token is of, -1 elsewhere), each (n,) int64; ``pixel_values``, a list of (channels, height, width).

        Raises:
            WrongRow: the chat has no answer, the template refuses it, or it is longer than the limit.
        """
        document = self._text.conversation(list(messages), 0, {})
        if document.bad:
            raise WrongRow(document.bad)
        assert document.learned is not None
        made = self._images(images)
        ids, learned = self._expanded(document.tokens, document.learned, made.tokens)
        if len(ids) > self.limit:
            # Never cut inside an image, and an answer without its image teaches guessing.
            raise WrongRow("row longer than data.sequence_length, its images included")
        starts = learned & ~np.concatenate([[False], learned[:-1]])
        tokens = torch.from_numpy(ids.astype(np.int64))
        mask = torch.from_numpy(learned)
        return {
            "input_ids": tokens,
            "labels": tokens.masked_fill(~mask, IGNORE_TOKEN),
            "attention_mask": torch.ones_like(tokens),
            "turns": torch.from_numpy(np.where(learned, starts.cumsum() - 1, -1)),
            "pixel_values": made.pixels,
        }

    def _images(self, images: Sequence[Image.Image]) -> Images:
        tokens, pixels = [], []
        for image in images:
            try:
                made = self.processor(text=self.processor.image_token, images=[image], return_tensors="pt", add_special_tokens=False)
            except ValueError as error:
                raise WrongRow(f"image that the processor refuses ({error})") from None
            tokens.append(made["input_ids"][0].tolist())
            pixels += list(made["pixel_values"])
        return Images(tokens, pixels)

    def _expanded(self, ids: np.ndarray, learned: np.ndarray, images: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        places = np.flatnonzero(ids == self.placeholder)
        if len(places) != len(images):
            raise WrongRow(f"{len(places)} image placeholder(s) after the chat template and {len(images)} image(s)")
        # Whatever belongs to an image is never learned.
        parts, masks, last = [], [], 0
        for place, image in zip(places, images, strict=True):
            parts += [ids[last:place], np.asarray(image)]
            masks += [learned[last:place], np.zeros(len(image), bool)]
            last = int(place) + 1
        return np.concatenate([*parts, ids[last:]]), np.concatenate([*masks, learned[last:]])
