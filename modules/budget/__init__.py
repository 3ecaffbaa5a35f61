"""Budget: the target, its measure, the regularizer that holds it, and its schedule over training."""
