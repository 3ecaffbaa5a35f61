"""Metrics that are summed over batches and ranks before anything is divided."""
