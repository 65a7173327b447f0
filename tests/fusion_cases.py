"""Tiny students and teachers with tokenizers of different families, on sentences of the standard library."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from distill_cases import another
from tiny_tokenizers import byte_bpe, sentence_piece, texts
from training_cases import llama, three_steps

from hf_fuse import DistillConfig, DistillTrainer
from hf_fuse.distill.aligned_teacher import AlignedTeacher
from hf_fuse.distill.pairing import Encoding
from hf_fuse.training_encoding import collate_tokens

LENGTH = 64


def rows(count: int = 24) -> list[dict[str, str]]:
    """Pieces of docstrings, the first words of each as the prompt."""
    found = [text[start : start + 90].strip() for text in texts()[:8] for start in range(0, 600, 120)]
    found = [text for text in found if len(text) > 50]
    return [{"prompt": text[:20], "completion": text[20:]} for text in found[:count]]


def ours() -> Encoding:
    return Encoding(byte_bpe(), LENGTH)


def theirs() -> Encoding:
    return Encoding(sentence_piece(), LENGTH)


def student(seed: int | None = None) -> Any:
    return (another(llama, vocab_size=400) if seed else partial(llama, vocab_size=400))()


def teacher() -> Any:
    """Of more tokens than its tokenizer has."""
    return another(llama, vocab_size=512, hidden_size=24)()


def encoded() -> list[dict[str, list[int]]]:
    return [{"input_ids": s.ids, "labels": s.labels} for row in rows() for s in ours().sides(row)]


def aligned(model: Any = None, encoding: Encoding | None = None, **options: Any) -> AlignedTeacher:
    """A teacher that reads with another tokenizer than the student, unless another model and encoding are given."""
    return AlignedTeacher(model or teacher(), rows(), student=ours(), encoding=encoding or theirs(), **options)


def make_trainer(output: Path, batch: int, accumulation: int, teachers: list, objectives: dict, **changes: Any) -> Any:
    """Three steps of SGD in the given layout."""
    model = changes.pop("model", student)()
    args = DistillConfig(**three_steps(output, batch, accumulation) | {"objectives": objectives} | changes)
    return DistillTrainer(
        model,
        args,
        teacher=teachers,
        train_dataset=encoded(),
        eval_dataset=encoded()[:7],
        data_collator=partial(collate_tokens, pad_id=byte_bpe().pad_token_id),
        processing_class=byte_bpe(),
    )


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
