"""Labels that count neither in a loss nor in a metric."""

from __future__ import annotations

# A pixel without a class: the usual value of data sets and of transformers.
IGNORE_PIXEL = 255
# A token that is not predicted: the value that losses of transformers leave out.
IGNORE_TOKEN = -100
