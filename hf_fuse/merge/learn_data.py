"""The examples to learn from: read, told apart by their columns, encoded for a model, and a number of them drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_fuse.checkpoint.reader import Checkpoint
from hf_fuse.errors import FuseError
from hf_fuse.evaluation_models import Candidate
from hf_fuse.merge.learn_pairs import encoded_pairs
from hf_fuse.merge.learn_recipe import LearnRecipe
from hf_fuse.training_data import Rows, TrainingData, encode, encode_images, read_rows
from hf_fuse.training_recipe import DataEntry

WRITERS = ("causal", "seq2seq")  # predict tokens: no head of their own, and no few classes


def read_examples(entry: DataEntry, checkpoint: Checkpoint) -> tuple[Rows, str, bool]:
    """Rows for a model, what it predicts from (``causal``, ``seq2seq``, ``text`` or ``image``), and whether labels mean
    anything.

    A classifier may be given texts without labels; they get one, which means nothing, because encoding asks for it.

    Raises:
        FuseError: everything that can be wrong with the data.
    """
    rows = read_rows(entry)
    labelled = not (rows.format == "text" and (checkpoint.architecture or "").endswith("ForSequenceClassification"))
    if not labelled:
        parts = [replace(part, rows=part.rows.add_column("label", [0] * len(part.rows))) for part in rows.train]
        rows = Rows("classification", parts, [])
    if rows.format == "classification":
        return rows, "image" if rows.has_images else "text", labelled
    kind = "seq2seq" if checkpoint.config.get("is_encoder_decoder") else "causal"
    if kind == "seq2seq" and (rows.format == "chat" or not isinstance(rows.train[0].rows[0].get("prompt", ""), str)):
        raise FuseError(
            f"{rows.train[0].name}: holds chats, but {checkpoint.ref} is an encoder-decoder. Give it texts in the "
            "columns prompt, which it reads, and completion, which it writes; or in the column text."
        )
    return rows, kind, labelled


def encoded_examples(rows: Rows, recipe: LearnRecipe, entry: DataEntry, candidate: Candidate) -> TrainingData:
    """``recipe.examples`` of the rows, encoded for a model; which ones depends on the recipe's seed."""
    data = _encoded(rows, recipe, entry, candidate)
    random = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(data.train), generator=random)[: recipe.examples].tolist()
    return TrainingData(data.format, data.train.select(chosen), None, data.collator, data.max_length)


def _encoded(rows: Rows, recipe: LearnRecipe, entry: DataEntry, candidate: Candidate) -> TrainingData:
    config: Any = candidate.config
    if rows.has_images:
        dtype = config.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        return encode_images(rows, candidate.processor, config, dtype or torch.float32)
    if rows.format != "classification" and config.is_encoder_decoder:
        return encoded_pairs(rows, entry, candidate)
    data = encode(rows, entry, candidate.processor, config)
    text = config.get_text_config()
    if rows.format == "classification" and text.pad_token_id is None:
        # Decoders classify at the last token that is no padding, so they must know which that is.
        text.pad_token_id = data.collator.keywords["pad_id"]
    return data
