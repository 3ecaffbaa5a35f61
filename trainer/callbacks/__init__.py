"""Callbacks: the step line, TensorBoard scalars and pictures, random state of checkpoints, and the guard against NaN."""
