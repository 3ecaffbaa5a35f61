"""Recipes: their schema, and reading them from files."""
