"""Names of the places where a stage can sit at a layer."""

from __future__ import annotations

# The sequence gets shorter for all that follows.
SHRINKING = ("before", "between")
# Only the chosen tokens go through; the sequence stays as long as it was.
BYPASS = ("around", "around_attention", "around_mlp")
SITES = (*SHRINKING, *BYPASS)
