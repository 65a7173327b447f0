"""Which sample of the training set each row of a batch is: for losses that remember samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_fuse.errors import FuseError

SAMPLE_IDS = "sample_ids"


class NumberedSamples(Dataset):
    """A data set whose rows have their index as ``sample_ids``, unless they bring such a column."""

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise FuseError(
                "sample_ids: the training set is a stream, whose samples have no index. Add a column sample_ids with "
                "a number for each sample, from 0 on."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {SAMPLE_IDS: index, **self.dataset[index]}


def keeping_sample_ids(collate: Callable[[list], Any]) -> Callable[[list], Any]:
    """``collate`` for the other columns, and ``sample_ids`` ``(B,)`` beside them: many collators drop what they don't
    know."""

    def collate_with_ids(rows: list[Mapping[str, Any]]) -> Any:
        if SAMPLE_IDS not in rows[0]:
            return collate(rows)  # of an evaluation
        others = [{name: value for name, value in row.items() if name != SAMPLE_IDS} for row in rows]
        batch = collate(others)
        batch[SAMPLE_IDS] = torch.tensor([int(row[SAMPLE_IDS]) for row in rows])
        return batch

    return collate_with_ids


def numbered(dataset: Any) -> Any:
    """``dataset`` with ``sample_ids``; itself if it has such a column."""
    return dataset if SAMPLE_IDS in (getattr(dataset, "column_names", None) or ()) else NumberedSamples(dataset)
