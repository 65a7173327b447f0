"""EnsLoss: another surrogate of the zero-one loss in each step, drawn at random.

For two classes where cross-entropy overfits, as dropout does in the network and this in the loss. Its value says
nothing, only its gradient: watch ``eval_loss``.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.losses._draws import random_of_step
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.losses._processes import gathered
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2409.00908"
IN_BATCH = True
TINY = 1e-6


def ens_loss(
    logits_NC: Tensor,
    labels_N: Tensor,
    step: int = 0,
    epoch: float = 0.0,
    *,
    period: Annotated[int, Between(0)] = 10,
    seed: int = 0,
) -> Tensor:
    """Mean of ``g_i m_i``, m the margin (the logit of the right class less that of the other), g a drawn slope.

    Slopes are negative and rise with the margin, so that each draw is the gradient of a convex, calibrated loss. Set
    the weight of ``task`` to 0. Slopes are dealt by rank in the batch: micro-batches are batches of their own,
    processes are taken together. The paper doesn't define it for more than two classes.

    Args:
        logits_NC: of two classes.
        labels_N: 0 or 1.
        step: number of the optimizer step.
        epoch: how many are done.
        period: after so many epochs the family of losses is drawn anew; 0: always the exponential one.
        seed: of the draws.

    Raises:
        FuseError: more or less than two classes.
    """
    if logits_NC.shape[-1] != 2:
        raise FuseError(f"ens_loss: the logits are of {logits_NC.shape[-1]} classes, expected 2. Use comp_sum.")
    difference_N = (logits_NC[:, 1] - logits_NC[:, 0]).float()
    margins_N = gathered((2 * class_indices(labels_N) - 1) * difference_N)
    # Families have a stream of their own, apart from those of the steps.
    power = random_of_step(seed, 2**32 + int(epoch) // period).uniform(-1, 1) if period else 0.0
    draws_N = random_of_step(seed, step).standard_normal(len(margins_N))
    return mean(slopes(margins_N, draws_N, power) * margins_N)


@torch.no_grad()
def slopes(margins_N: Tensor, draws_N: np.ndarray, power: float) -> Tensor:
    """g: the sorted ``-(max(0, 1 + power n))^(1 / power)`` of the draws n, for power 0 ``-e^n``; at least -1."""
    with np.errstate(divide="ignore", over="ignore"):
        sizes_N = np.maximum(0, 1 + power * draws_N) ** (1 / power) if power else np.exp(draws_N)
    sorted_N = torch.from_numpy(np.sort(-np.minimum(sizes_N, 1))).to(margins_N)
    slopes_N = torch.empty_like(margins_N)
    slopes_N[margins_N.argsort()] = sorted_N
    return slopes_N / margins_N.clamp(min=1) - TINY
