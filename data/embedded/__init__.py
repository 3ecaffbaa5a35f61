"""Data sets that are made from an installed dependency, so that recipes run without a network."""
