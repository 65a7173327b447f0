"""Class-balanced cross-entropy: rare classes weigh more, by the effective number of their samples.

For fine-tuning on imbalanced classes, at no cost; deferred re-weighting learns better features first.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1901.05555"


def class_balanced(
    logits_NC: Tensor,
    labels_N: Tensor,
    class_counts_C: Tensor,
    progress: float = 1.0,
    *,
    beta: Annotated[float, Between(0, 1)] = 0.9999,
    defer_until: Annotated[float, Between(0, 1)] = 0.0,
) -> Tensor:
    """Mean of ``w_y`` times cross-entropy. Set the weight of ``task`` to 0 to use it instead of the cross-entropy.

    The mean is over predictions, not over weights as in ``torch.nn.CrossEntropyLoss(weight=...)``: a batch without rare
    classes does not give the frequent ones more weight.

    Args:
        logits_NC: of the predictions that have a label.
        labels_N: class indices.
        class_counts_C: how often each label occurs in the training set.
        progress: share of the training that is done.
        beta: 0 weighs all classes alike; towards 1 the weights become those of inverse frequency.
        defer_until: share of the training with equal weights (deferred re-weighting; 0.8 in LDAM-DRW).
    """
    loss_N = torch.nn.functional.cross_entropy(logits_NC.float(), class_indices(labels_N), reduction="none")
    if progress < defer_until:
        return mean(loss_N)
    return mean(balancing_weights(class_counts_C, beta)[labels_N] * loss_N)


def balancing_weights(class_counts_C: Tensor, beta: float) -> Tensor:
    """``(1 - beta) / (1 - beta^n)``, scaled to sum C; a class that does not occur weighs as one that occurs once."""
    counts_C = class_counts_C.clamp(min=1).float()
    if beta == 0:
        weights_C = torch.ones_like(counts_C)
    elif beta == 1:
        weights_C = 1 / counts_C
    else:
        # expm1 keeps the digits that 1 - beta^n loses for beta near 1.
        weights_C = -1 / torch.expm1(counts_C * math.log(beta))
    return weights_C * len(counts_C) / weights_C.sum()
