"""P, the strategy: what becomes of the tokens that a decision leaves out: one class a file, found by the file's name."""
