"""Errors caused by the user's input."""

from __future__ import annotations


class RecipeError(ValueError):
    """The user's recipe or override is wrong; the message has the place, what is allowed, and the cure."""
