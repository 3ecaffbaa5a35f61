"""From a chat with images to what a model reads: token ids with the places of visual tokens, learned tokens, and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...modules.tokens.labels import IGNORE_TOKEN
from ..text.conversations import WrongRow


@dataclass(frozen=True)
class Answer:
    """A learned part of a chat's text.

    Attributes:
        turn: number of the answer in the chat, from 0.
        start: its first character.
        stop: the character behind its last one.
    """

    turn: int
    start: int
    stop: int


class ChatEncoder:
    """Encodes chats with the processor of a vision-language model.

    The text of a chat is that of the processor's template, with one placeholder for an image. What stands for an image in the end (as many
    placeholders as it has visual tokens, and what a family puts around them) is what the processor makes of the placeholder alone.

    Args:
        processor: processor of transformers with an image processor, a fast tokenizer, an ``image_token`` and a chat template.
        limit: largest number of tokens of a row, those of images included.

    Raises:
        ValueError: the processor lacks one of these, or its template does not write parts of a message.
    """

    def __init__(self, processor: Any, limit: int) -> None:
        name = type(processor).__name__
        lacking = [part for part in ("image_processor", "tokenizer", "image_token") if getattr(processor, part, None) is None]
        if lacking:
            raise ValueError(f"the processor {name} has no {', '.join(lacking)}: it is not one of a supported family")
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {name} is not a fast one, which knows the place of a token in its text: convert it")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name} has no eos_token, so that no answer would end: set one in its files")
        if not (processor.chat_template or tokenizer.chat_template):
            raise ValueError("the processor has no chat template: set data.chat_template to a Jinja template")
        self.processor, self.tokenizer, self.limit = processor, tokenizer, limit
        self.placeholder: int = tokenizer.convert_tokens_to_ids(processor.image_token)
        # What the tokenizer puts in front of every text, as it does in use.
        first = tokenizer("x")["input_ids"][0]
        self._begin: int | None = first if first == tokenizer.bos_token_id else None
        self._check_template()

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
        ids, turns = self._text(list(messages))
        tokens, pixels = self._images(images)
        ids, turns = self._expanded(ids, turns, tokens)
        if len(ids) > self.limit:
            # Never cut inside an image, and an answer without its image teaches guessing.
            raise WrongRow("row longer than data.sequence_length, its images included")
        found, of = torch.from_numpy(ids), torch.from_numpy(turns)
        # The first token has nothing to be predicted from.
        of[0] = -1
        return {
            "input_ids": found,
            "labels": found.masked_fill(of < 0, IGNORE_TOKEN),
            "attention_mask": torch.ones_like(found),
            "turns": of,
            "pixel_values": pixels,
        }

    def _render(self, messages: Sequence[dict[str, Any]], prompting: bool) -> str:
        """Text of a chat; with ``prompting`` the beginning of the next answer follows."""
        template = self.processor.chat_template or self.tokenizer.chat_template
        text: str = self.tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompting
        )
        return text

    def _check_template(self) -> None:
        parts = [{"type": "image"}, {"type": "text", "text": "x"}]
        try:
            text = self._render([{"role": "user", "content": parts}], True)
        except Exception:
            # Templates raise exceptions of any type for chats that they refuse; each row is checked later.
            return
        if "[{" in text or self.processor.image_token not in text:
            raise ValueError(
                f"the chat template writes no {self.processor.image_token} for a message with an image: set data.chat_template to one that does"
            )

    def _text(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 token ids with one placeholder an image, and (n,) int64 the answer that each is of, -1 for none."""
        answered = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answered:
            raise WrongRow("no answer of the assistant")
        try:
            text = self._render(messages, False)
            answers = []
            for turn, number in enumerate(answered):
                before, after = self._render(messages[:number], True), self._render(messages[: number + 1], False).rstrip()
                # Templates may change earlier turns when later ones follow (remove thoughts, for example): such turns are not learned.
                if text.startswith(before) and text.startswith(after) and len(after) > len(before):
                    answers.append(Answer(turn, len(before), len(after)))
        except Exception as error:
            # Templates raise exceptions of any type for unexpected roles.
            raise WrongRow(f"chat template refuses the row ({type(error).__name__})") from None
        if not answers:
            raise WrongRow(
                "chat template writes every answer otherwise than it begins one: set data.chat_template to one that writes both alike"
            )
        return self._encoded(text, answers)

    def _encoded(self, text: str, answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
        end = self.tokenizer.eos_token
        last = answers[-1]
        if end not in text[last.start : last.stop]:
            # The template ends an answer with the marker of the next turn, or not at all: generation would never stop.
            text = text[: last.stop] + end
            answers = [*answers[:-1], Answer(last.turn, last.start, len(text))]
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(made["input_ids"], np.int64)
        places = np.asarray(made["offset_mapping"], np.int64).reshape(-1, 2)
        turns = np.full(len(ids), -1, np.int64)
        for answer in answers:
            turns[(places[:, 1] > answer.start) & (places[:, 0] < answer.stop)] = answer.turn
        if self._begin is not None and not text.startswith(self.tokenizer.bos_token):
            ids, turns = np.insert(ids, 0, self._begin), np.insert(turns, 0, -1)
        return ids, turns

    def _images(self, images: Sequence[Image.Image]) -> tuple[list[np.ndarray], list[Tensor]]:
        """The token ids that stand for each image, and (channels, height, width) of each."""
        tokens, pixels = [], []
        for image in images:
            try:
                made = self.processor(text=self.processor.image_token, images=[image], return_tensors="pt", add_special_tokens=False)
            except (TypeError, ValueError) as error:
                raise WrongRow(f"image that the processor refuses ({error})") from None
            tokens.append(made["input_ids"][0].numpy())
            pixels += list(made["pixel_values"])
        return tokens, pixels

    def _expanded(self, ids: np.ndarray, turns: np.ndarray, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        places = np.flatnonzero(ids == self.placeholder)
        if len(places) != len(images):
            raise WrongRow(f"{len(places)} image placeholder(s) after the chat template and {len(images)} image(s)")
        parts, of, last = [], [], 0
        for place, image in zip(places, images, strict=True):
            # Whatever belongs to an image is never learned.
            parts += [ids[last:place], image]
            of += [turns[last:place], np.full(len(image), -1)]
            last = int(place) + 1
        return np.concatenate([*parts, ids[last:]]), np.concatenate([*of, turns[last:]])
