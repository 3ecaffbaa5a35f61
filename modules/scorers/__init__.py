"""E, the criterion: one class a file, found by the file's name."""
