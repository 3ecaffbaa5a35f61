"""Errors that are one message, without a traceback."""

from __future__ import annotations


class RecipeError(ValueError):
    """The user's recipe or override is wrong; the message has the place, what is allowed, and the cure."""


class NotSaved(RuntimeError):
    """A checkpoint or a result could not be written; the message says what is kept, and the cure."""
