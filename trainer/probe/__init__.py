"""Which layers of a model can be left out or see fewer tokens, by measured loss."""
