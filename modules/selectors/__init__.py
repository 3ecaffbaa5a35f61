"""Selectors: scores and a requested count in, a decision out; one class per file, found by the file name."""
