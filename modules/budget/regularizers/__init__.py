"""Routings in, a loss out: one class a file, found by the file's name."""
