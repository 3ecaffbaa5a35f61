"""Budget: the target, how it is measured, the regulariser that holds it, and its schedule over training."""
