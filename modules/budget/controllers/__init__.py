"""Controllers: the gap between achieved and requested in, a term of the loss out; one class per file, found by the file name."""
