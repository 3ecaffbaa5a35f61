"""Tokens of a forward: their state, decisions, trace, gathering, bypass and restore."""
