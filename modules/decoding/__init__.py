"""Token-by-token generation: the cache of keys and values, and the changes to transformers' ``generate``."""
