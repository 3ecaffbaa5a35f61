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
# Share of predicted tokens below which a phase of bags gets a remark.
FEW = 0.5


def check_rows(recipe: Recipe, data: Splits) -> list[str]:
    """Reads rows from all over each split; returns what to know of the data, one line each.

    Args:
        recipe: the recipe.
        data: its splits.

    Raises:
        ValueError: a split has no rows, the training rows of a phase are fewer than a batch of all processes, or a phase predicts no token.
        BadRows: more rows are bad than ``data.max_bad_fraction`` allows.
    """
    lines = list(data.remarks)
    if data.train_rows is None:
        return lines
    # Raises for too few rows.
    data.train_batches(recipe.data.batch_size, 1, recipe.seed, 0, processes_of(recipe.trainer))
    lines += _check_bags(recipe, data)
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


def _check_bags(recipe: Recipe, data: Splits) -> list[str]:
    """A line for each phase of bags that predicts few tokens. Raises ValueError if it predicts none, or has fewer rows than a batch."""
    lines = []
    for number, phase in enumerate(recipe.phases or ()):
        if phase.bag is None:
            continue
        key, bagged = phase.setting(number), data.in_bags(phase.bag)
        rows: Any = bagged.train
        if not rows.predicted:
            raise ValueError(
                f"{key} predicts no token: no document has more than {phase.bag} tokens, and the first bag of a document is not predicted; "
                "take a smaller bag, or longer documents"
            )
        try:
            bagged.train_batches(recipe.data.batch_size // phase.fewer_rows, 1, recipe.seed, 0, processes_of(recipe.trainer))
        except ValueError as error:
            raise ValueError(
                f"{key}: rows of bags are {phase.bag} times as long as others, and there are fewer of them: {error}, take a smaller bag, or "
                "use more text"
            ) from None
        share = rows.predicted / rows.corpus.size
        if share < FEW:
            lines.append(
                f"{key} predicts {100 * share:.0f} % of the tokens, as the first bag of a document is not predicted: take a smaller bag, or "
                "longer documents"
            )
    return lines
