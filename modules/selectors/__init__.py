"""Scores and a count in, a decision out: one class a file, found by the file's name."""
