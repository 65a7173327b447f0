"""LoRAMoE's localized balancing: experts of one group share the load evenly, groups specialise by kind of task.

For mixtures of experts whose groups are to serve different kinds of tasks (``delta`` above 0).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2312.09979"
IN_BATCH = True


def localized_balance(
    router_weights: tuple[Tensor, ...],
    attention_mask: Tensor | None = None,
    task_types: Tensor | None = None,
    *,
    delta: Annotated[float, Between(0, 1)] = 0.0,
) -> Tensor:
    """Mean over layers of ``var(Z) / mean(Z)^2``, ``Z_be = I_be sum_s weight_bse`` over samples b and experts e.

    I is ``1 + delta`` where the group of the expert fits the sample's task and ``1 - delta`` elsewhere; the first half
    of the experts is for ``task_types`` 1, the second for 0. var divides by n - 1. 0 when all experts carry the same
    load and delta = 0. The authors' script leaves delta and the weight of this loss 0. The loss of a batch is not
    the mean of the losses of its parts.

    Args:
        router_weights: per layer ``(B, S, E)``.
        attention_mask: ``(B, S)``, 0 for padding. (The authors count padding.)
        task_types: ``(B,)`` of 0 and 1; needed if delta > 0.
        delta: how strongly the groups are to specialise.

    Raises:
        FuseError: delta > 0 without task types or with an odd number of experts; weights without a batch axis.
    """
    losses = []
    for weights in router_weights:
        if weights.dim() != 3:
            raise FuseError(f"router_weights: expected (batch, sequence, experts), got {tuple(weights.shape)}.")
        weights_BSE = weights.float()
        if attention_mask is not None:
            weights_BSE = torch.where(attention_mask.bool().unsqueeze(-1), weights_BSE, 0)
        load_BE = weights_BSE.sum(1)
        if delta:
            load_BE = load_BE * _importance(load_BE, task_types, delta)
        mean = load_BE.mean()
        variance = load_BE.var() if load_BE.numel() > 1 else load_BE.sum() * 0
        losses.append(variance / mean.square().clamp(min=1e-10))
    return torch.stack(losses).mean()


def _importance(load_BE: Tensor, task_types: Tensor | None, delta: float) -> Tensor:
    experts = load_BE.shape[1]
    if task_types is None:
        raise FuseError("localized_balance: delta > 0 needs task_types, 0 or 1 for each sample of the batch.")
    if experts % 2:
        raise FuseError(f"localized_balance: delta > 0 halves the experts into two groups, but there are {experts}.")
    first_half_E = torch.arange(experts, device=load_BE.device) < experts // 2
    fits_BE = first_half_E == (task_types.reshape(-1, 1) == 1)
    return torch.where(fits_BE, 1 + delta, 1 - delta)
