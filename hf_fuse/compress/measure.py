"""What a model costs and how well it predicts: the two rows of the table before and after compression."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from hf_fuse.compress.subject import PROBE_TOKENS, Subject
from hf_fuse.perplexity import context_length, perplexity

REPEATS, SECONDS = 5, 0.3  # of each, at least
TITLES = {
    "parameters": "parameters",
    "bytes": "bytes on disk",
    "perplexity": "perplexity",
    "tokens_per_second": "tokens per second",
}


def measure(subject: Subject, model: Any, stored_bytes: int) -> dict[str, float]:
    """Parameters in memory, bytes on disk, perplexity on the evaluation text (if there is any), and speed."""
    figures: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": stored_bytes}
    if subject.evaluation and subject.kind == "causal":
        figures["perplexity"] = perplexity(model, subject.candidate.processor, subject.evaluation).perplexity
    figures["tokens_per_second"] = speed(subject, model)
    return figures


@torch.no_grad()
def speed(subject: Subject, model: Any) -> float:
    """Tokens per second of a forward pass over one sequence: the fastest of many, the one that nobody disturbed."""
    length = min(4 * PROBE_TOKENS, context_length(model.config) or 4 * PROBE_TOKENS)
    rows = model.get_input_embeddings().weight.shape[0]
    ids_1T = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(0))
    times = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        start = time.perf_counter()
        subject.run(model, ids_1T).logits.sum().item()  # .item() waits for a GPU
        times.append(time.perf_counter() - start)
    return length / min(times)


def print_table(before: Mapping[str, float], after: Mapping[str, float], console: Any) -> None:
    from rich.table import Table

    table = Table("", "before", "after", "after / before", title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for key, title in TITLES.items():
        if key in before and key in after:
            numbers = [f"{value:,.{3 if key == 'perplexity' else 0}f}" for value in (before[key], after[key])]
            table.add_row(title, *numbers, f"{after[key] / before[key]:.3f}")
    console.print(table)
