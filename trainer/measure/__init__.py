"""Measurements of a run: paired step times, cost tables, the report, versions."""
