"""Regularizers: routings in, a loss out; one class per file, found by the file name."""
