"""Training: tasks, callbacks, checkpoints, export, and the command line."""

if __name__ == "trainer":
    raise ImportError("import laconic.trainer instead of trainer: from the repository's root, `trainer` would load a second copy")
