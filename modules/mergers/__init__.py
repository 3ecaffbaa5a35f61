"""Mergers (P, the strategy), which remove or merge the tokens that are not kept: one class per file, found by the file name."""
