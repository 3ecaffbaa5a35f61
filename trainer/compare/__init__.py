"""Arms of a recipe trained alike over several seeds, with paired differences: ``laconic compare``."""
