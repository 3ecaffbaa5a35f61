"""Shipped recipes: YAML files, one or more base recipes per task, and small overlays."""

if __name__ == "recipes":
    raise ImportError("import laconic.recipes instead of recipes: from the repository's root, `recipes` would load a second copy")
