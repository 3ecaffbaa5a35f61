"""The tasks, one a file: the folder is the registry, the file's name is ``task`` in a recipe."""
