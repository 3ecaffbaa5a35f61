"""Tokens that a stage's config protects at the beginning of documents and at the end of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_protect(given: Any, scope: str) -> None:
    """Raises ValueError unless ``given`` states numbers of tokens, and those of the end are of a scope that has one."""
    numbers = list(given.values()) if isinstance(given, Mapping) and set(given) <= {"first", "last"} else []
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError(
            f"compression.stages[].protect = {given!r} must be {{first: N}}, {{last: N}} or both, with N an integer of at least 1"
        )
    if "last" in given and scope != "prompt":
        raise ValueError(
            f"compression.stages[].protect = {given!r}: the last tokens are those of a prompt, and scope = {scope!r}: set scope = prompt, or "
            "remove last"
        )
