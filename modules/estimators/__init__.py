"""How a gradient reaches the scorer although tokens are really dropped: one class a file, found by the file's name."""
