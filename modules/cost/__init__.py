"""Cost of a forward, computed from token counts: count rules, shapes of stacks, MACs, bytes."""
