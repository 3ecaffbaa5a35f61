"""Callbacks: the step line, TensorBoard scalars and pictures, checkpoints and their random state, and the guard against NaN."""
