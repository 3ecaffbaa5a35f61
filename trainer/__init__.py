"""What trains: tasks, callbacks, checkpoints, export, and the command line."""

if __name__ == "trainer":
    raise ImportError("import laconic.trainer, not trainer: from the repository's root the bare name makes a second copy")
