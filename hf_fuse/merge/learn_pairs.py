"""Texts for an encoder-decoder to learn from: what it reads, and what it is to write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.evaluation_models import Candidate
from hf_fuse.training_data import Rows, TrainingData, row_length
from hf_fuse.training_encoding import IGNORED, check_ids
from hf_fuse.training_recipe import DataEntry


def encoded_pairs(rows: Rows, entry: DataEntry, candidate: Candidate) -> TrainingData:
    """Prompts to read and completions to write, in token ids; of plain texts the first half and the second.

    Raises:
        CheckpointError: the model does not say which token its decoder begins with.
        FuseError: a row without prompt or completion, or no rows.
    """
    from datasets import concatenate_datasets

    config: Any = candidate.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise CheckpointError(f"{candidate.name}: its config.json has no decoder_start_token_id. Add it.")
    length = row_length(entry, candidate.processor, config)
    parts = []
    for part in rows.train:
        encode = partial(_encoded, candidate.processor, length, config.vocab_size)
        made = part.rows.map(
            partial(_numbered, part.name, encode), with_indices=True, remove_columns=part.rows.column_names
        )
        parts.append(made.filter(lambda row: row["input_ids"] and row["labels"]))
    if not any(map(len, parts)):
        raise FuseError(f"{rows.train[0].name}: nothing to learn from is left. Its texts have less than two tokens.")
    pad = candidate.processor.pad_token_id
    collator = partial(collate_pairs, start_id=start, pad_id=start if pad is None else pad)
    return TrainingData(rows.format, concatenate_datasets(parts), None, collator, length)


def _numbered(name: str, encode: Callable[[dict], Any], row: dict[str, Any], index: int) -> Any:
    try:
        return encode(row)
    except FuseError as error:
        raise FuseError(f"{name}: row {index + 1}: {error}") from None


def _encoded(tokenizer: Any, length: int, vocabulary: int, row: dict[str, Any]) -> dict[str, list[int]]:
    limits = {"truncation": True, "max_length": length}
    if "text" in row:
        ids = tokenizer(row["text"] or "", **limits)["input_ids"]
        read, written = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    else:
        for column in ("prompt", "completion"):
            if not row[column]:
                raise FuseError(f"has no {column}.")
        read = tokenizer(row["prompt"], **limits)["input_ids"]
        written = tokenizer(text_target=row["completion"], **limits)["input_ids"]
    check_ids([*read, *written], vocabulary)
    return {"input_ids": read, "labels": written}


def collate_pairs(rows: list[dict], *, start_id: int, pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the right: ``input_ids`` and ``attention_mask`` ``[B, L]``, ``labels`` and ``decoder_input_ids``
    ``[B, T]``. Position t of the decoder predicts label t."""

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in lists], True, value)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "decoder_input_ids": padded([[start_id, *row["labels"][:-1]] for row in rows], pad_id),
    }
