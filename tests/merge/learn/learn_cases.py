"""Tiny models with a tokenizer and text that they can read, for tests of estimators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, WIDTH, WORDS, _architectures, save_tokenizer

TEXTS = [
    " ".join(WORDS[(start + step * k) % len(WORDS)] for k in range(2 + start % 5))
    for start in range(12)
    for step in (1, 2)
]


def saved(kind: str, folder: Path, classes: int = 4) -> Path:
    """A model of one of ``tiny_models.ARCHITECTURES``, or ``classifier``: BERT with a head of ``classes``."""
    torch.manual_seed(0)
    if kind == "classifier":
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, pad_token_id=3, num_labels=classes, initializer_range=0.5,
        )  # fmt: skip
        model: Any = BertForSequenceClassification(config)
    else:
        model = _architectures()[kind]()
        with torch.no_grad():
            for parameter in model.parameters():  # far from uniform predictions
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def written_texts(file: Path, labels: int | None = None) -> Path:
    rows = [{"text": text} | ({} if labels is None else {"label": k % labels}) for k, text in enumerate(TEXTS)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file
