"""Estimators, which give the scorer a gradient although tokens are really dropped: one class per file, found by the file name."""
