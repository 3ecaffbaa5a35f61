"""Builds the parts of a run from a recipe: data, model, initial weights, budget, optimizer, Lightning Trainer."""
