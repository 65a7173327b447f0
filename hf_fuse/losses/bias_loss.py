"""Bias loss: samples whose features vary little count less, since there is little to learn from them.

For small image classifiers with compact backbones; the evidence is from small convolutional networks. Costs nothing.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_fuse.batch_counts import IGNORED
from hf_fuse.losses._predictions import class_indices
from hf_fuse.losses._processes import gathered
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2107.11170"
IN_BATCH = True
MEAN_OVER = "predictions"


def bias_loss(
    sample_logits_BC: Tensor,
    sample_labels_B: Tensor,
    hidden_states: tuple[Tensor, ...],
    attention_mask: Tensor | None = None,
    *,
    alpha: Annotated[float, Between(0)] = 0.3,
    beta: Annotated[float, Between(0)] = 0.3,
) -> Tensor:
    """Mean of ``(e^(alpha v) - beta) * cross-entropy``, v the variance of the sample's last hidden state, brought to
    0 to 1 over the batch.

    Instead of the task's cross-entropy: set the weight of ``task`` to 0. The public code takes the lowest variance of
    all past batches and the range of the present one, so that v may exceed 1; here both are of the batch. It compares
    the samples of a batch: micro-batches are batches of their own, processes are taken together.

    Args:
        sample_logits_BC: one row per sample.
        sample_labels_B: class indices, -100 for samples that don't count.
        hidden_states: of which the last is looked at, all tokens and channels.
        attention_mask: 0 for tokens that aren't.
        alpha: how much more the samples of the largest variance count.
        beta: subtracted from all weights.

    Raises:
        FuseError: not one class per sample.
    """
    labels_B = class_indices(sample_labels_B)
    weights_B = (alpha * _in_range(variances(hidden_states[-1], attention_mask))).exp() - beta
    loss_B = cross_entropy(sample_logits_BC.float(), labels_B, reduction="none", ignore_index=IGNORED)
    return (weights_B * loss_B).sum() / (labels_B != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def variances(states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """``(B,)`` over all numbers of a sample, of tokens that count."""
    rows = states.float().flatten(1)
    if attention_mask is None or attention_mask.shape != states.shape[:2]:
        return rows.var(-1, correction=0)
    kept = (attention_mask != 0).unsqueeze(-1).expand(states.shape).flatten(1)
    count_B1 = kept.sum(-1, keepdim=True).clamp(min=1)
    mean_B1 = torch.where(kept, rows, 0).sum(-1, keepdim=True) / count_B1
    return torch.where(kept, rows - mean_B1, 0).square().sum(-1) / count_B1.squeeze(-1)


def _in_range(variances_B: Tensor) -> Tensor:
    of_all = gathered(variances_B)
    # Equal variances: all count as the lowest.
    return (variances_B - of_all.min()) / (of_all.max() - of_all.min()).clamp(min=torch.finfo(torch.float32).tiny)
