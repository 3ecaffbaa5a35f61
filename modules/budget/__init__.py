"""Budget: the target, its measure, the regulariser that holds it, and its schedule over training."""
