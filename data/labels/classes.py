"""Classes of a labelled data set: their names, the class number of each row, and the number of rows of each class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Names in one message.
_NAMED = 5


@dataclass(frozen=True)
class KnownClasses:
    """Classes of a trained model, onto which the labels of a data set are mapped by name.

    Attributes:
        names: names of the classes, in the order of the model's answers.
        owner: the model, for messages.
        cure: what else can be done with a class that the model lacks, for messages; None if the data may have any other classes, for
            which a new head is trained.
    """

    names: tuple[str, ...]
    owner: str
    cure: str | None


@dataclass(frozen=True)
class Labels:
    """Labels of the splits of a data set.

    Attributes:
        classes: names of the classes.
        numbers: for each split, (n,) int64 class number of each row, -1 for a bad label.
        bad: for each split, the reason of each bad label by row.
    """

    classes: list[str]
    numbers: Mapping[str, np.ndarray]
    bad: Mapping[str, Mapping[int, str]]

    @property
    def counts(self) -> dict[str, tuple[int, ...]]:
        """Rows of each class, by name of the split."""
        return {
            split: tuple(np.bincount(numbers[numbers >= 0], minlength=len(self.classes)).tolist())
            for split, numbers in self.numbers.items()
        }


def read_labels(
    splits: Mapping[str, Any], column: str, sources: Iterable[str], num_labels: int | None, known: KnownClasses | None
) -> Labels:
    """Reads the labels of all splits.

    Args:
        splits: rows by name of the split, ``train`` among them.
        column: column with the labels.
        sources: names of the splits whose labels are the classes, if the column does not name them.
        num_labels: ``data.num_labels``; None counts the classes.
        known: classes of the model that is evaluated or continues to train; None if it has none.

    Raises:
        ValueError: a value is no label, the data have a class that the model lacks, another number of classes, or fewer than two.
    """
    labels = {split: label_names(rows, column) for split, rows in splits.items()}
    occurring = {label for split in sources for label in labels[split] if label is not None}
    named = _class_names(splits["train"], column)
    classes = used_classes(named or _sorted(occurring), occurring, num_labels, known)
    numbers, bad = {}, {}
    for split, found in labels.items():
        numbers[split], bad[split] = class_numbers(found, classes)
    return Labels(classes, numbers, bad)


def label_names(rows: Any, column: str) -> list[str | None]:
    """Name of the label of each row; None for a missing label.

    Raises:
        ValueError: a value is neither a text nor a whole number.
    """
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        # datasets writes -1 for a row without a label.
        return [feature.names[value] if value is not None and value >= 0 else None for value in rows[column]]
    return [_name(value, column) for value in rows[column]]


def _name(value: Any, column: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers in which some are missing is read as float.
        return str(int(value))
    shown = str(value) if len(str(value)) < 50 else f"{str(value)[:50]} …"
    kind = "a number with a fraction" if isinstance(value, float) else f"a {type(value).__name__}"
    raise ValueError(
        f"column {column!r} holds {kind}, {shown}: a label is a text or a whole number; set data.label_column to such a column"
    )


def _class_names(rows: Any, column: str) -> list[str]:
    """Names of a ClassLabel column; none of another column."""
    import datasets

    feature = rows.features[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else []


def _sorted(names: Iterable[str]) -> list[str]:
    """Numbers in their own order, other names by alphabet."""
    found = list(names)
    return sorted(found, key=int) if _are_numbers(found) else sorted(found)


def used_classes(own: Sequence[str], occurring: Iterable[str], num_labels: int | None, known: KnownClasses | None) -> list[str]:
    """The classes that the labels are numbered by.

    Args:
        own: classes of the data.
        occurring: those of them that have a row.
        num_labels: ``data.num_labels``; None counts the classes.
        known: classes of the model that is evaluated or continues to train; None if it has none.

    Raises:
        ValueError: the data have a class that the model lacks, another number of classes, or fewer than two.
    """
    if known is not None:
        unknown = _sorted(set(occurring) - set(known.names))
        if unknown and known.cure is not None:
            raise ValueError(
                f"the data have {listed(unknown)}, and {known.owner} has {listed(known.names)}: labels are compared by name; rename or "
                f"remove them{known.cure}"
            )
        if known.cure is not None or set(own) == set(known.names):
            return list(known.names)
    if num_labels is not None and len(own) != num_labels:
        if not _are_numbers(own):
            raise ValueError(
                f"data.num_labels = {num_labels}, and the data have {listed(own)}: remove data.num_labels, or set it to {len(own)}"
            )
        return [str(number) for number in range(num_labels)]
    if len(own) < 2:
        raise ValueError(f"the data have {listed(own)}, and a classifier needs 2 or more: check data.label_column and the data")
    return list(own)


def class_numbers(labels: Sequence[str | None], classes: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """(n,) int64 number of each label's class, -1 for a bad label, and the reason of each bad label by row."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = np.asarray([-1 if label is None else numbers.get(label, -1) for label in labels], np.int64)
    numbered = list(classes) == [str(number) for number in range(len(classes))]
    unknown = f"label out of range 0 … {len(classes) - 1}" if numbered else "label that no training row has"
    return found, {row: "missing label" if labels[row] is None else unknown for row in np.flatnonzero(found < 0).tolist()}


def without(classes: Sequence[str], counts: Mapping[str, Sequence[int]], unit: str = "rows") -> list[str]:
    """One line for each class without a row in a split.

    Args:
        classes: names of the classes.
        counts: rows of each class, by name of the split.
        unit: what is counted.
    """
    lines = []
    for split, numbers in counts.items():
        empty = [name for name, number in zip(classes, numbers, strict=True) if not number]
        lines += [f"class {name}: 0 {unit} in {split}" for name in empty[:_NAMED]]
        if len(empty) > _NAMED:
            lines.append(f"{len(empty) - _NAMED} more classes: 0 {unit} in {split}")
    return lines


def occurring_only(metric: str, classes: Sequence[str], counts: Sequence[int]) -> str | None:
    """What to know of a metric over labels that lack classes; None if every class occurs.

    Args:
        metric: name of the metric.
        classes: names of the classes.
        counts: labels of each class that the metric counted.
    """
    empty = [name for name, number in zip(classes, counts, strict=False) if not number]
    return f"{metric} says nothing of {listed(empty)}, of {len(classes)} in all: no label has it" if empty else None


def _are_numbers(names: Iterable[str]) -> bool:
    return all(name.removeprefix("-").isdecimal() for name in names)


def listed(names: Sequence[str]) -> str:
    """``the class 'a'``, ``the classes 'a', 'b'`` or ``1,000 classes ('a', 'b' …)``."""
    if not names:
        return "no class"
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    if len(names) > _NAMED:
        return f"{len(names):,} classes ({shown} …)"
    return f"the class{'es' if len(names) > 1 else ''} {shown}"
