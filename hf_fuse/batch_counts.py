"""How much a batch holds: micro-batches count by their share in the whole batch of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size
from torch import Tensor

IGNORED = -100
# What the mean of a loss is taken over.
PREDICTIONS, SAMPLES, TOKENS = "predictions", "samples", "tokens"
UNITS = (PREDICTIONS, SAMPLES, TOKENS)


def count(inputs: dict[str, Any], device: torch.device, *, shifted: bool) -> Tensor:
    """How many predictions, samples and tokens there are, in the order of ``UNITS``, ``(3,)``.

    Args:
        inputs: of the model. Without labels each sample is a prediction, without a 2-D mask all ``input_ids`` count.
        device: of the answer.
        shifted: whether predictions are of the next tokens, as in causal language models.
    """
    labels, shifted = labels_of(inputs, shifted=shifted)
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    samples = tokens = predictions = find_batch_size(inputs)
    if isinstance(labels, Tensor):
        predictions = (labels[..., 1:] if shifted else labels).ne(IGNORED).sum()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        tokens = mask.ne(0).sum()
    elif isinstance(ids, Tensor):
        tokens = ids.numel()
    return torch.stack([torch.as_tensor(number, device=device) for number in (predictions, samples, tokens)])


def count_of_column(values: Any, device: torch.device, *, shifted: bool) -> Tensor:
    """How many entries of a column count: those that are neither NaN nor ``IGNORED``; of a batch its predictions."""
    if isinstance(values, Mapping):
        return count(values, device, shifted=shifted)[UNITS.index(PREDICTIONS)]
    if not isinstance(values, Tensor):
        return torch.zeros((), dtype=torch.long, device=device)
    counted = ~values.isnan() if values.is_floating_point() else values.ne(IGNORED)
    return counted.sum().to(device)


def labels_of(inputs: dict[str, Any], *, shifted: bool) -> tuple[Any, bool]:
    """The labels, and whether they are still to be shifted by one against the logits."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"], False
    return inputs.get("labels"), shifted


def repeated_samples(inputs: dict[str, Any], accelerator: Accelerator) -> Tensor | None:
    """Which samples ``(B,)`` accelerate has added to fill up the last round of an evaluation; None if it hasn't."""
    state, size = accelerator.gradient_state, find_batch_size(inputs)
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    place_B = accelerator.process_index * size + torch.arange(size, device=accelerator.device)
    return place_B >= state.remainder


def masked(inputs: dict[str, Any], rows_B: Tensor, **fillers: int) -> dict[str, Tensor]:
    """The named inputs with their filler in some rows; floats (regression targets) are left out."""
    found = {}
    for name, filler in fillers.items():
        values = inputs.get(name)
        if isinstance(values, Tensor) and not values.is_floating_point():
            found[name] = values.masked_fill(rows_B.view(-1, *[1] * (values.dim() - 1)), filler)
    return found
