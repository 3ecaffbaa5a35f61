"""Errors that a user's input causes."""

from __future__ import annotations


class RecipeError(ValueError):
    """The user's recipe or override is wrong; the message says where, what is allowed, and the cure."""
