"""Choosing training text for a target domain: a fifth of a mixed pool, and a small language model trained on it."""

from __future__ import annotations

import math
import random
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from study.trials import Effort, Found, Question, Row
from torch import Tensor

from hf_fuse.data.methods.color_filter import color_filter
from hf_fuse.data.methods.dsir import dsir
from hf_fuse.data.selection import best
from hf_fuse.data.stdlib_text import Domain, stdlib_domains
from hf_fuse.demo_training import ModelSize, Schedule, byte_tokenizer, new_model, token_stream, train

RANDOM, OWN = "random choice", "text of the target alone"
SIZE = ModelSize(hidden=48, feed_forward=96, layers=2, heads=2, context=96)
LENGTH, KEPT = 600, 40  # characters of a text, texts that are kept of 200
TARGET = "manual"

QUESTIONS = {
    "text, chosen data": Question(
        "perplexity per byte of the target's held-out text", RANDOM, lower_is_better=True, references=(OWN,)
    ),
    "text, chosen data, share": Question("share of the chosen texts that are of the target", RANDOM, references=(OWN,)),
}


def selection_of_seed(seed: int, effort: Effort) -> Found:
    """Question -> method -> row: 160 texts of code and docstrings, 40 of the language reference; a fifth is kept."""
    draw, tokenizer = random.Random(seed), byte_tokenizer(SIZE.context)
    texts = {domain.name: _cut(domain.train, draw) for domain in _domains()}
    held = {domain.name: _cut(domain.held_out, draw) for domain in _domains()}[TARGET]
    others = [text for name, own in texts.items() if name != TARGET for text in own[:80]]
    pool = texts[TARGET][:KEPT] + others
    draw.shuffle(pool)
    known, own = texts[TARGET][KEPT : 2 * KEPT], texts[TARGET][2 * KEPT : 3 * KEPT]
    validation, test = held[:30], held[30:60]

    def model(chosen: list[str], steps: int, start: Any = None, rate: float = 4e-3) -> Any:
        made = new_model(SIZE, tokenizer, seed)
        if start is not None:
            made.load_state_dict(start.state_dict())
        train(made, [token_stream(tokenizer, chosen, 10**9)], Schedule(steps, rate), seed=seed)
        return made

    prior = model(pool, effort.language_steps)
    conditional = model(known, effort.language_steps // 2, prior, 2e-3)

    def kept(scores: np.ndarray, drawn: bool = False) -> list[str]:
        return [pool[number] for number in best(scores, KEPT, np.random.default_rng(seed) if drawn else None)]

    difference = color_filter(
        pool, lambda: (prior, tokenizer), lambda: (conditional, tokenizer), max_length=SIZE.context, batch_size=32
    )
    tried = {
        RANDOM: {f"draw {n}": random.Random(1000 * seed + n).sample(pool, KEPT) for n in range(2)},
        OWN: {"": own},
        "dsir": {
            "drawn": kept(dsir(pool, known, min_words=20), True),
            "per word, highest": kept(dsir(pool, known, min_words=20, per_word=True)),
        },
        "color_filter": {"": kept(difference)},
    }
    found: Found = {question: {} for question in QUESTIONS}
    of_target = {*texts[TARGET]}
    for method, by_setting in tried.items():
        lowest = math.inf
        for label, chosen in list(by_setting.items())[: effort.settings]:
            learned = model(chosen, effort.language_steps)
            reached = perplexity(learned, tokenizer, validation)
            if reached < lowest:
                lowest = reached
                share = sum(text in of_target for text in chosen) / len(chosen)
                found["text, chosen data"][method] = Row(perplexity(learned, tokenizer, test), label)
                found["text, chosen data, share"][method] = Row(share, label)
    print(f"seed {seed}: selection done", file=sys.stderr, flush=True)
    return found


@lru_cache
def _domains() -> list[Domain]:
    return stdlib_domains(source_characters=600_000)


def _cut(documents: tuple[str, ...], draw: random.Random) -> list[str]:
    """Pieces of ``LENGTH`` characters, in random order."""
    pieces = [text[a : a + LENGTH] for text in documents for a in range(0, len(text) - LENGTH, LENGTH)]
    draw.shuffle(pieces)
    return pieces


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Per byte."""
    stream = token_stream(tokenizer, texts, 10**9)
    windows: Tensor = stream[: len(stream) // SIZE.context * SIZE.context].view(-1, SIZE.context)
    return math.exp(model(input_ids=windows, labels=windows).loss.item())
