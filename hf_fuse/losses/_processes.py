"""Batches that lie on several processes, seen as one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def gathered(rows_B: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; alone and in evaluation, the given ones.

    For losses that every process computes in full, from the rows of all. Only one's own rows carry a gradient, times
    the number of processes: DDP's mean over the processes is then the gradient of the whole loss. All processes must
    call it, with equally many rows.
    """
    # An evaluation drops the samples that were repeated to fill its last round: processes may have different counts.
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows_B
    parts = [torch.empty_like(rows_B) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows_B.detach().contiguous())
    if rows_B.requires_grad:
        # The value stays, the gradient is multiplied.
        parts[dist.get_rank()] = rows_B + (rows_B - rows_B.detach()) * (len(parts) - 1)
    return torch.cat(parts)
