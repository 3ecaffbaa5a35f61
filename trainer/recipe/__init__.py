"""Recipes: what a recipe may say, and how one is read from files."""
