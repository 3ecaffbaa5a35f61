"""Chats as data sets write them, as a chat template reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Speakers of ShareGPT, by the roles of chat templates.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class WrongRow(ValueError):
    """A row cannot be used; the message has the same words for the same fault."""


def messages_of(value: Any) -> list[dict[str, Any]]:
    """A chat with ``role`` and ``content`` in every message, content parts of text joined.

    Args:
        value: list of messages of OpenAI (``role`` and ``content``, a text or parts of text) or ShareGPT (``from`` and ``value``).

    Raises:
        WrongRow: it is not a chat, or a message has no text.
    """
    if not isinstance(value, list | tuple) or not value:
        raise WrongRow("no messages")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise WrongRow("message without role")
    # A column of chats has the keys of all messages in every message; absent ones are None.
    given: dict[str, Any] = without_none(message)
    if "role" not in given and "from" in given:
        speaker = str(given.pop("from"))
        if speaker not in _SPEAKERS:
            raise WrongRow(f"message from {speaker!r}, which is none of {', '.join(_SPEAKERS)}")
        given = {"role": _SPEAKERS[speaker], "content": given.pop("value", None), **given}
    if not isinstance(given.get("role"), str):
        raise WrongRow("message without role")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if content is None and given.get("tool_calls"):
        return given
    if not isinstance(content, str):
        raise WrongRow("message without text")
    return {**given, "content": content}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise WrongRow(f"message with a part of type {kind!r}, and only text is read")
    text: str = part["text"]
    return text


def options_of(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``apply_chat_template`` from the columns beside a chat: ``tools``, ``documents``, and those in ``chat_template_kwargs``.

    Raises:
        WrongRow: a column has another form.
    """
    options: dict[str, Any] = {}
    for name, kind in (("tools", list), ("documents", list), ("chat_template_kwargs", Mapping)):
        value = without_none(_decoded(name, beside.get(name)))
        if not value:
            continue
        if not isinstance(value, kind):
            raise WrongRow(f"{name} of type {type(value).__name__} in place of a {'list' if kind is list else 'mapping'}")
        options |= value if name == "chat_template_kwargs" else {name: value}
    return options


def _decoded(name: str, value: Any) -> Any:
    """Data sets store nested values as JSON too, where rows differ in form."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except ValueError:
        raise WrongRow(f"{name} that are not JSON") from None


def without_none(value: Any) -> Any:
    """The value without the keys of mappings that are None, at any depth: Arrow adds the keys of other rows."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value
