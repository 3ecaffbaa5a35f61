"""The export formats: one class a file, found by the file's name."""
