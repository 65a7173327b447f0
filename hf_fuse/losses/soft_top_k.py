"""Soft top-k: a sample's labels are to be among its k highest scores.

For classifiers with many labels of which k are shown or used: it stops caring once a label is well inside the k.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_fuse.losses._labels import label_matrix, mean_of_positives
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2310.10636"
BISECTIONS = 32


def soft_top_k(
    logits_NL: Tensor,
    labels_N: Tensor,
    *,
    k: Annotated[int | None, Between(1)] = 5,
    alpha: Annotated[float, Between(0, open_low=True)] = 2.0,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
) -> Tensor:
    """Mean over samples of the mean over their labels of ``-log p_l``, where ``p = sigmoid(alpha (s + t))`` sums to k.

    t is found by bisection; its gradient is exact (implicit). From k = L on everything is inside and the loss is
    nearly 0. Samples without labels give 0 and count in the mean.

    Args:
        logits_NL: of L labels.
        labels_N: ``(N, L)`` of 0 and 1, or ``(N,)`` class indices.
        k: how many are inside; None: as many as the sample has labels.
        alpha: sharpness.
        temperature: divides the logits; the paper's 0.05 is for similarities of unit vectors.
    """
    positive_NL, _ = label_matrix(labels_N, logits_NL)
    inside_N1 = positive_NL.sum(-1, keepdim=True) if k is None else torch.full_like(logits_NL[:, :1], k).long()
    log_p_NL = _LogSoftTopK.apply(logits_NL.float() / temperature, inside_N1, alpha)
    return mean_of_positives(-log_p_NL, positive_NL)


def shift(scores_NL: Tensor, k_N1: Tensor, alpha: float) -> Tensor:
    """t ``(N, 1)`` with ``sum sigmoid(alpha (s + t)) = k``."""
    low_N1 = -scores_NL.amax(-1, keepdim=True) - 10 / alpha
    high_N1 = -scores_NL.amin(-1, keepdim=True) + 10 / alpha
    for _ in range(BISECTIONS):
        middle_N1 = (low_N1 + high_N1) / 2
        too_many_N1 = (alpha * (scores_NL + middle_N1)).sigmoid().sum(-1, keepdim=True) > k_N1
        low_N1, high_N1 = low_N1.where(too_many_N1, middle_N1), middle_N1.where(too_many_N1, high_N1)
    return (low_N1 + high_N1) / 2


class _LogSoftTopK(torch.autograd.Function):
    """``log p``; keeps the scores alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores_NL: Tensor, k_N1: Tensor, alpha: float) -> Tensor:
        shift_N1 = shift(scores_NL, k_N1, alpha)
        ctx.save_for_backward(scores_NL, shift_N1)
        ctx.alpha = alpha
        return logsigmoid(alpha * (scores_NL + shift_N1))

    @staticmethod
    def backward(ctx: Any, gradient_NL: Tensor) -> tuple[Tensor, None, None]:
        scores_NL, shift_N1 = ctx.saved_tensors
        p_NL = (ctx.alpha * (scores_NL + shift_N1)).sigmoid()
        direct_NL = gradient_NL * ctx.alpha * (1 - p_NL)
        # t moves so that the sum stays k.
        slope_NL = p_NL * (1 - p_NL)
        total_N1 = slope_NL.sum(-1, keepdim=True).clamp(min=torch.finfo(slope_NL.dtype).tiny)
        return direct_NL - direct_NL.sum(-1, keepdim=True) * slope_NL / total_N1, None, None
