"""Tokens that a stage's config protects: at the beginning of documents, at the end of prompts, and those that begin or end texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Default around layers of causal models. Later tokens attend to the first token and to delimiters more than to others (attention sinks, arXiv
# 2309.17453, 2402.17762), so that a pretrained model suffers where they bypass a layer.
SINKS: Mapping[str, int | bool] = {"first": 1, "special": True}


def check_protect(given: Any, scope: str) -> None:
    """Raises ValueError unless ``given`` states what it may, and tokens at the end are of a scope that has one."""
    known = isinstance(given, Mapping) and bool(given) and set(given) <= {"first", "last", "special"}
    numbers = [number for key, number in given.items() if key != "special"] if known else [None]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers) or not isinstance(
        given.get("special", False), bool
    ):
        raise ValueError(
            f"compression.stages[].protect = {given!r} must have first, last, special or several of them: first and last are integers of at "
            "least 0, special is true or false; {first: 0} protects no token"
        )
    if "last" in given and scope != "prompt":
        raise ValueError(
            f"compression.stages[].protect = {given!r}: the last tokens are those of a prompt, and scope = {scope!r}: set scope = prompt, or "
            "remove last"
        )
