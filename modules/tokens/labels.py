"""Label values that losses and metrics ignore."""

from __future__ import annotations

# A pixel without a class; the usual value of data sets and of transformers.
IGNORE_PIXEL = 255
# A token that is not a target; the value that transformers' losses ignore.
IGNORE_TOKEN = -100
