"""Generating token by token: the cache of keys and values, and what ``generate`` of transformers needs."""
