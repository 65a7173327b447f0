"""A teacher that was asked before: its predictions come from a cache, with the batch, and no model is in memory.

B rows of a batch, S tokens, K kept tokens, N predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fuse.batch_counts import IGNORED
from hf_fuse.distill.cache import TeacherCache, row_key
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError

CACHED = "cached_predictions"  # column of a batch: for each cached teacher, its tensors


class CachedTeacher:
    """Finds a batch's texts in a cache, packed ones one by one, by the hash of their tokens.

    Args:
        cache: of predictions.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache, self.facts = cache, cache.facts
        self.name = f"cache {cache.folder}"

    def look_up(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the teacher predicts at each place of a batch on the CPU, laid out like logits: place s tells of token
        s + 1. Where nothing is known, ids are 0, log probabilities -inf, and ``covered`` is False.

        Returns:
            ``ids`` and ``log_probs`` ``(B, S, K)``; ``tail``, ``label``, ``log_z`` and ``covered`` ``(B, S)``.
        """
        size = batch["input_ids"].shape
        found = {
            "ids": torch.zeros(*size, self.facts.k, dtype=torch.int32),
            "log_probs": torch.full((*size, self.facts.k), float("-inf"), dtype=torch.float16),
            "tail": torch.zeros(size),
            "label": torch.full(size, float("-inf")),
            "log_z": torch.zeros(size),
            "covered": torch.zeros(size, dtype=torch.bool),
        }
        for row, start, ids, wanted in _texts(batch):
            number = self._number(ids, wanted)
            if number is None:
                continue
            known = self.cache.row(number)
            kept = torch.from_numpy(np.isin(known.positions_N.numpy(), wanted))
            places = start + known.positions_N[kept] - 1
            for name, values in zip(found, (*known.predictions.rows(kept).tensors, torch.tensor(True))):
                found[name][row, places] = values.to(found[name].dtype)
        return found

    def missing(self, batch: dict[str, Any]) -> Iterator[str]:
        """Why texts of a batch are not covered, one sentence for each that isn't."""
        for _, _, ids, wanted in _texts(batch):
            if self._number(ids, wanted) is None:
                if self.cache.find(row_key(ids)):
                    yield "some of its labels have no prediction (another train_on, or another end of the prompt)"
                else:
                    yield f"no text of {len(ids)} such tokens is in it (another text, chat template or max_length)"

    def predictions(self, found: dict[str, Tensor], labels: Tensor, *, shifted: bool) -> TopK:
        """Of what :meth:`look_up` found, those ``(N, K)`` that have a label.

        Raises:
            FuseError: a label has no prediction.
        """
        predicted_BS = labels != IGNORED
        if shifted:
            predicted_BS = F.pad(predicted_BS[:, 1:], (0, 1))
        kept = {name: values.to(labels.device)[predicted_BS] for name, values in found.items()}
        if not (self.facts.partial or kept["covered"].all()):
            raise FuseError(
                f"{self.name}: a label of the batch has no prediction. Make the cache of all training data."
            )
        return TopK(
            kept["ids"].long(), kept["log_probs"].float(), kept["tail"], kept["label"], self.facts.temperature,
            kept["log_z"],
        )  # fmt: skip

    def _number(self, ids: np.ndarray, wanted: np.ndarray) -> int | None:
        """Of the row of the cache with these tokens and predictions for the wanted ones."""
        rows = self.cache.find(row_key(ids))
        if self.facts.partial:
            return next(iter(rows), None)
        return next((row for row in rows if np.isin(wanted, self.cache.positions(row)).all()), None)


class WithPredictions:
    """A data collator whose batches bring what cached teachers predict for them.

    Args:
        collate: makes the batch.
        teachers: in the order of the column's entries.
    """

    def __init__(self, collate: Callable[[list], Any], teachers: list[CachedTeacher]) -> None:
        self.collate, self.teachers = collate, teachers

    def __call__(self, rows: list) -> Any:
        batch = self.collate(rows)
        batch[CACHED] = [teacher.look_up(batch) for teacher in self.teachers]
        return batch


def _texts(batch: dict[str, Any]) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Row, first place, tokens, and which of them have a label, of every text of a batch that has any.

    A text begins where positions begin anew, and ends where padding does.

    Raises:
        FuseError: the batch has no tokens or labels, or labels that aren't the tokens themselves.
    """
    if "input_ids" not in batch or "labels" not in batch:
        raise FuseError(
            f"A teacher's cache needs batches with input_ids and labels; they have {', '.join(map(str, batch))}."
        )
    ids_BS, labels_BS = batch["input_ids"].numpy(), batch["labels"].numpy()
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    mask_BS = np.ones(ids_BS.shape, bool) if mask is None else mask.numpy().astype(bool)
    begins_BS = np.zeros(ids_BS.shape, bool)
    begins_BS[:, 0] = True
    begins_BS[:, 1:] |= mask_BS[:, 1:] != mask_BS[:, :-1]
    if positions is not None:
        begins_BS |= positions.numpy() == 0
    for row, (ids_S, labels_S, mask_S, begins_S) in enumerate(zip(ids_BS, labels_BS, mask_BS, begins_BS)):
        starts = np.flatnonzero(begins_S)
        for start, stop in zip(starts, [*starts[1:], len(ids_S)]):
            ids, labels = ids_S[start:stop], labels_S[start:stop]
            wanted = np.flatnonzero(labels[1:] != IGNORED) + 1
            if not mask_S[start] or not len(wanted):
                continue
            if (labels[wanted] != ids[wanted]).any():
                raise FuseError(
                    "A teacher's cache is of texts, but labels of the batch are other tokens than its input_ids."
                )
            yield row, int(start), ids, wanted
