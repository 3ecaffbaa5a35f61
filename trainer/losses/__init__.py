"""Losses besides a model's own: token loss for large vocabularies, and distillation."""
