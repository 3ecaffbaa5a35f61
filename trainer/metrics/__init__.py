"""Metrics, summed over batches and ranks before the final division."""
