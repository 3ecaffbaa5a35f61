"""Data that ship with a dependency, so that recipes run without a network."""
