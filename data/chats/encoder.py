"""From a chat with images to what a model reads: token ids with the places of visual tokens, learned tokens, and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...modules.tokens.labels import IGNORE_TOKEN
from ..text.conversations import WrongRow

# What a processor makes of the text; everything else describes images.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "offset_mapping", "text_replacement_offsets")


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
    placeholders as it has visual tokens, and what a family puts around them) is what the processor makes of the whole row, as in use.

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
            learned token is of, -1 elsewhere), each (n,) int64; ``images``, what the processor makes of the images, by name, one entry or
            several for an image along the first dimension, empty without images.

        Raises:
            WrongRow: the chat has no answer, the template or the processor refuses it, or it is longer than the limit.
        """
        text, answers = self._text(list(messages))
        ids, turns, made = self._encoded(text, answers, images)
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
            "images": made,
        }

    def question(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """A batch of one chat that waits for an answer, as ``generate`` takes it.

        Args:
            messages: messages with parts of type ``image`` and ``text``, the last one of the user.
            images: the images of its parts, in their order.

        Raises:
            WrongRow: the processor refuses an image.
        """
        ids, _, made = self._encoded(self._render(messages, True), (), images)
        found = torch.from_numpy(ids)[None]
        return {"input_ids": found, "attention_mask": torch.ones_like(found), **made}

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

    def _text(self, messages: list[dict[str, Any]]) -> tuple[str, list[Answer]]:
        """The text of a chat with one placeholder an image, and its learned parts."""
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
        end, last = self.tokenizer.eos_token, answers[-1]
        if end not in text[last.start : last.stop]:
            # The template ends an answer with the marker of the next turn, or not at all: generation would never stop.
            text = text[: last.stop] + end
            answers = [*answers[:-1], Answer(last.turn, last.start, len(text))]
        return text, answers

    def _encoded(
        self, text: str, answers: Sequence[Answer], images: Sequence[Image.Image]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
        """(n,) int64 token ids, (n,) int64 the answer that each is of, -1 for none, and what the processor makes of the images."""
        made, replaced = self._processed(text, images)
        ids = np.asarray(made["input_ids"], np.int64).reshape(-1)
        places = np.asarray(made["offset_mapping"], np.int64).reshape(-1, 2)
        turns = np.full(len(ids), -1, np.int64)
        for answer in answers:
            start, stop = (_moved(place, replaced) for place in (answer.start, answer.stop))
            turns[(places[:, 1] > start) & (places[:, 0] < stop)] = answer.turn
        for part in replaced:
            # Whatever belongs to an image is never learned.
            start, stop = part["new_span"]
            turns[(places[:, 1] > start) & (places[:, 0] < stop)] = -1
        if self._begin is not None and not text.startswith(self.tokenizer.bos_token):
            ids, turns = np.insert(ids, 0, self._begin), np.insert(turns, 0, -1)
        return ids, turns, {name: value for name, value in made.items() if name not in _OF_TEXT}

    def _processed(self, text: str, images: Sequence[Image.Image]) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """What the processor makes of a row, and the spans that it has put in the places of placeholders."""
        placeholders = text.count(self.processor.image_token)
        if placeholders != len(images):
            raise WrongRow(f"{placeholders} image placeholder(s) after the chat template and {len(images)} image(s)")
        how = {"add_special_tokens": False, "return_offsets_mapping": True}
        if not images:
            return self.tokenizer(text, **how), []
        try:
            made = self.processor(text=[text], images=[list(images)], return_tensors="pt", return_text_replacement_offsets=True, **how)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise WrongRow(f"image that the processor refuses ({error})") from None
        (replaced,) = made["text_replacement_offsets"]
        return made, replaced


def _moved(place: int, replaced: Sequence[Mapping[str, Any]]) -> int:
    """Where a character of the text is after the replacements."""
    behind = [part for part in replaced if part["span"][1] <= place]
    return place + (behind[-1]["new_span"][1] - behind[-1]["span"][1] if behind else 0)
