"""Several processes: how they start, what they exchange, DeepSpeed, and resuming."""
