"""Losses beside a model's own: tokens of large vocabularies in parts, and distillation."""
