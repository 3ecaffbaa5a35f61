"""A row of a data set as a chat with images: the forms in which people store them, in one."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..images.decoding import Unusable, decode, in_colours
from ..text.conversations import WrongRow, messages_of, without_none

# Stands for an image in a message that is one text.
PLACEHOLDER = "<image>"
_ADDRESS = ("http://", "https://", "ftp://")
_INLINE = "data:image/"


def chat_of(value: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """A chat whose messages are parts of type ``image`` and ``text``, and the images that its parts hold themselves.

    Args:
        value: messages of OpenAI (``role`` and ``content``, a text or parts) or of LLaVA and ShareGPT (``from`` and ``value``), or the JSON
            of one. In a text, ``<image>`` stands for an image.

    Returns:
        The chat, and for every image part what it holds: None if it only stands for an image of the row's column.

    Raises:
        WrongRow: it is not a chat.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise WrongRow("a text in place of messages") from None
    if not isinstance(value, list | tuple) or not value:
        raise WrongRow("no messages")
    messages, held = [], []
    for given in value:
        content = without_none(given).get("content") if isinstance(given, Mapping) else None
        if not isinstance(content, list):
            (message,) = messages_of([given])
            parts = list(_of_text(message.get("content") or ""))
            held += [None] * sum(part["type"] == "image" for part in parts)
        else:
            parts = [part for item in content for part in _of_part(item, held)]
            (message,) = messages_of([{**given, "content": ""}])
        messages.append({**message, "content": parts})
    return messages, held


def asked(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The texts of each answer of the assistant and of what stands between it and the one before, without images.

    Args:
        messages: messages with parts, of ``chat_of``.

    Returns:
        Question and answer of each turn.
    """
    found, question = [], list[str]()
    for message in messages:
        text = " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text").strip()
        if message["role"] == "assistant":
            found.append(("\n".join(question), text))
            question = []
        else:
            question.append(text)
    return found


def _of_text(text: str) -> Iterator[dict[str, str]]:
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number:
            yield {"type": "image"}
        # Data sets put the placeholder on a line of its own.
        piece = piece.strip("\n") if len(pieces) > 1 else piece
        if piece:
            yield {"type": "text", "text": piece}


def _of_part(part: Any, held: list[Any]) -> Iterator[dict[str, str]]:
    given = without_none(part) if isinstance(part, Mapping) else {}
    kind = "text" if isinstance(part, str) else given.get("type")
    text = part if isinstance(part, str) else given.get("text")
    if kind == "text" and isinstance(text, str):
        parts = list(_of_text(text))
        held += [None] * sum(found["type"] == "image" for found in parts)
        yield from parts
    elif kind in ("image", "image_url"):
        held.append(next((given[name] for name in ("image", "path", "url", "image_url", "bytes") if name in given), None))
        yield {"type": "image"}
    else:
        raise WrongRow(f"message with a part of type {kind!r}, and only text and images are read")


def images_of(value: Any, held: Sequence[Any], folder: Path) -> list[Image.Image]:
    """The images of a chat in RGB, in the order of its image parts.

    Args:
        value: what the row's image column holds: an image, a list of images, or None.
        held: what the image parts hold, from ``chat_of``.
        folder: folder that paths start from.

    Raises:
        WrongRow: there are more or fewer images than parts, or one cannot be read.
    """
    column = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    own = [item for item in held if item is not None]
    if own and column and len(own) == len(held):
        raise WrongRow("images both in the messages and in the image column")
    if own and len(own) < len(held):
        raise WrongRow("some image parts hold their image and others do not")
    found = own or column
    if len(found) != len(held):
        raise WrongRow(f"{len(held)} image placeholder(s) in the messages and {len(found)} image(s)")
    return [_image(item, folder) for item in found]


def _image(value: Any, folder: Path) -> Image.Image:
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    try:
        if isinstance(value, str) and value.startswith(_INLINE):
            value = {"bytes": base64.b64decode(value.partition(",")[2], validate=True), "path": None}
        if isinstance(value, str | os.PathLike):
            value = {"path": _file(str(value), folder), "bytes": None}
        if not isinstance(value, Image.Image) and not (isinstance(value, Mapping) and (value.get("bytes") or value.get("path"))):
            raise WrongRow(f"{type(value).__name__} without an image in place of one: name the column of images in data.image_column")
        return in_colours(decode(value), 3)
    except WrongRow:
        raise
    except Unusable as error:
        raise WrongRow(str(error)) from None
    except Exception as error:
        # Decoders raise exceptions of many types.
        raise WrongRow(f"undecodable image ({type(error).__name__})") from None


def _file(name: str, folder: Path) -> str:
    if name.startswith(_ADDRESS):
        raise WrongRow("image given as an address, which is not fetched: store the image in a file or in the row")
    path = folder / name
    if not path.is_file():
        raise WrongRow("image file that does not exist")
    return str(path)
