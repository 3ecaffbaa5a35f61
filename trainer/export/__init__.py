"""Exports: ``formats/`` holds one file a format; here is what they share. Each export is verified in a clean process after writing."""
