"""Shortcuts: what tokens that bypass a layer get in place of its update, found by file name."""
