"""Exports: one file a format, each verified after writing in a clean process."""
