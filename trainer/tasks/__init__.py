"""What can be learned, one task a file: the folder is the registry, the file's name is ``task`` in a recipe."""
