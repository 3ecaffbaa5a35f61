"""Exports of trained models, verified in a clean process: shared parts; ``formats/`` has one file a format."""
