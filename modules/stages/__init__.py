"""Stages without a router of their own."""
