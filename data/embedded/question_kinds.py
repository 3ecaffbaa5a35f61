"""The kinds of questions about digits; ``digit_questions.py`` asks them."""

from __future__ import annotations

QUESTIONS = ("reading", "counting", "locating", "presence", "listing", "naming")
