"""Checks opened data before training: a few rows are read as training reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...data.rows import BadRowCount
from ...data.splits import Splits
from ..distributed.strategies import processes_of
from ..recipe.schema import Recipe

# Rows of each split that are read.
READ = 8


def check_rows(recipe: Recipe, data: Splits) -> list[str]:
    """Reads rows from all over each split; returns what to know of the data, one line each.

    Args:
        recipe: the recipe.
        data: its splits.

    Raises:
        ValueError: a split has no rows, or the training rows are fewer than a batch of all processes.
        BadRows: more rows are bad than ``data.max_bad_fraction`` allows.
    """
    lines = list(data.remarks)
    if data.train_rows is None:
        return lines
    # Raises for too few rows.
    data.train_batches(recipe.data.batch_size, 1, recipe.seed, 0, processes_of(recipe.trainer))
    splits: dict[str, Any] = {"train": data.train, "validation": data.validation} | ({"test": data.test} if data.has_test else {})
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"the split for {split} has no rows: check data.data_files and the names of the splits")
        chosen = np.unique(np.linspace(0, len(rows) - 1, READ).astype(int)).tolist()
        bad = [item["bad"] for item in (rows[row] for row in chosen) if "bad" in item]
        count = BadRowCount(recipe.data.max_bad_fraction, len(rows))
        count.add(len(chosen), bad)
        if bad:
            lines.append(f"{split}, {len(chosen)} rows read: bad rows {count.summary()}")
    return lines
