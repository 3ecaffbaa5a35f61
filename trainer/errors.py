"""Errors that are one message, without a traceback."""

from __future__ import annotations

from pydantic import ValidationError


class RecipeError(ValueError):
    """The user's recipe or override is wrong; the message has the place, what is allowed, and the cure."""


class NotSaved(RuntimeError):
    """A checkpoint or a result could not be written; the message says what is kept, and the cure."""


def first_fault(error: ValidationError) -> str:
    """Place in the content, if there is one, and message of the first thing that is wrong with it."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
