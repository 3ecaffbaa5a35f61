"""From a recipe to the parts of a run: data, model, initial weights, budget, optimizer, Lightning's trainer."""
