"""Reading and writing weights: adapter folders, LoRA, base weights, training checkpoints, whole models."""
