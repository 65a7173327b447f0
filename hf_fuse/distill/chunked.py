"""Losses on a vocabulary without ever holding a ``[tokens, vocabulary]`` tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_sum(function: Callable[..., Tensor], *rows_N: Tensor, chunk_size: int) -> Tensor:
    """``function(*rows)`` as the sum of its values for chunks of the rows, with the same gradients.

    Each chunk's intermediate results are dropped after the forward pass and computed again in the backward pass: put
    the output layer inside of ``function``, and only one chunk's logits exist at a time. It costs the layer's forward
    pass a second time::

        def loss(hidden_ND, teacher_hidden_ND):
            with torch.no_grad():
                teacher_NV = teacher_head(teacher_hidden_ND)
            return forward_kl(student_head(hidden_ND), teacher_NV)

        chunked_sum(loss, hidden_ND, teacher_hidden_ND, chunk_size=256) / predictions

    Args:
        function: of tensors with the same first dimension; returns a sum over it, of any shape.
        rows_N: its arguments.
        chunk_size: how many rows are computed at a time.
    """
    total: Any = 0
    # No row at all is a chunk too: the sum stays tied to the graph.
    for start in range(0, max(len(rows_N[0]), 1), chunk_size):
        chunk = [rows[start : start + chunk_size] for rows in rows_N]
        if torch.is_grad_enabled():
            total = total + checkpoint(function, *chunk, use_reentrant=False)
        else:
            total = total + function(*chunk)
    return total
