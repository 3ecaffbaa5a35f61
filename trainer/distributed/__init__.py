"""Distributed training: starting processes, collectives, DeepSpeed, and resuming."""
