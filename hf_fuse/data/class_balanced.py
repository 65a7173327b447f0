"""Class-balanced sampling: every class equally often, rare ones by repeating their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_fuse.errors import FuseError
from hf_fuse.registry import nearest

if TYPE_CHECKING:
    from datasets import Dataset


def class_balanced(rows: Dataset, label_column: str = "label", *, size: int | None = None, seed: int = 0) -> Dataset:
    """A view of ``rows`` in which each class has the same number of rows, up to one.

    The view comes in rounds of one row per class, in random order: read without shuffling
    (``train_sampling_strategy="sequential"``), every batch is balanced too. Within a class no row comes again before
    all others have come; a class with more rows than there are rounds is cut, by chance.

    Args:
        rows: a dataset with one class per row.
        label_column: its column of classes: numbers or names.
        size: rows of the view; default: as many as ``rows`` has.
        seed: of all orders.

    Raises:
        FuseError: no such column, no rows, rows without a class or of several, or fewer rows asked for than there are
            classes.
    """
    if label_column not in rows.column_names:
        raise FuseError(f"the dataset has no column {label_column!r}. {nearest(label_column, rows.column_names)}")
    labels = list(rows[label_column])
    if unlabelled := [number for number, label in enumerate(labels) if label is None]:
        raise FuseError(
            f"column {label_column!r}: row {unlabelled[0]} (counted from 0) has no class. Leave such rows out."
        )
    if labels and isinstance(labels[0], (list, dict)):
        raise FuseError(f"column {label_column!r}: holds more than one value per row; expected one class.")
    classes, class_of_row = np.unique(np.array(labels), return_inverse=True)
    size = len(rows) if size is None else size
    if not len(classes) or size < len(classes):
        raise FuseError(f"size is {size}; expected at least one row of each of the {len(classes)} classes.")
    draw = np.random.default_rng(seed)
    rounds = -(-size // len(classes))
    by_class = []
    for number in range(len(classes)):
        members = np.flatnonzero(class_of_row == number)
        passes = [draw.permutation(members) for _ in range(-(-rounds // len(members)))]
        by_class.append(np.concatenate(passes)[:rounds])
    order = [draw.permutation(one_of_each) for one_of_each in np.stack(by_class, axis=1)]
    return rows.select(np.concatenate(order)[:size])
