"""Shipped recipes: YAML files, a base per task and small overlays."""

if __name__ == "recipes":
    raise ImportError("import laconic.recipes, not recipes: from the repository's root the bare name makes a second copy")
