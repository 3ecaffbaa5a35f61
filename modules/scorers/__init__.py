"""Scorers (E, the criterion): one class per file, found by the file name."""
