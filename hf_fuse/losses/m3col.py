"""M3CoL: two encoders are aligned on mixed samples, whose partners in the other modality are two.

For pairs of images and texts, or others, that share more than one by one; beside the task's loss, with weight 0.1, for
models with two towers such as CLIP.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._draws import random_of_step
from hf_fuse.losses._predictions import mean
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._similarities import unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2409.17777"
IN_BATCH = True


def m3col(
    image_embeds_ND: Tensor,
    text_embeds_ND: Tensor,
    step: int = 0,
    progress: float = 0.0,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 0.1,
    alpha: Annotated[float, Between(0, open_low=True)] = 0.15,
    mixed: Annotated[float, Between(0, 1)] = 0.5,
    mix_until: Annotated[float, Between(0, 1)] = 1.0,
    target_temperature: Annotated[float, Between(0, open_low=True)] = 0.125,
    seed: int = 0,
) -> Tensor:
    """InfoNCE of mixed embeddings of one modality with those of the other, both ways: ``b x_i + (1 - b) x_j`` is to
    recognise i with share b and j with share 1 - b.

    b is 1 or, with probability ``mixed``, from Beta(alpha, alpha). After ``mix_until`` of the training nothing is
    mixed, and targets are how similar the other modality's samples are to each other. In the public code the other
    modality is mixed too, by an error. It compares the samples of a batch: micro-batches are batches of their own,
    processes are taken together.

    Args:
        image_embeds_ND: of the first modality.
        text_embeds_ND: of the second.
        step: number of the optimizer step.
        progress: share of the training that is done.
        temperature: of cosines.
        alpha: of the beta distribution.
        mixed: share of the samples that are mixed.
        mix_until: share of the training.
        target_temperature: of the targets afterwards.
        seed: of the draws.
    """
    views = gathered(unit(image_embeds_ND)), gathered(unit(text_embeds_ND))
    count, random, total = len(views[0]), random_of_step(seed, step), 0
    for rows_ND, other_ND in (views, views[::-1]):
        if progress >= mix_until:
            targets_NN = (other_ND.detach() @ other_ND.detach().T / target_temperature).softmax(-1)
        else:
            partners_N = torch.from_numpy(random.permutation(count)).to(rows_ND.device)
            draws_N = random.beta(alpha, alpha, count)
            draws_N[random.random(count) >= mixed] = 1.0
            shares_N = torch.from_numpy(draws_N).to(rows_ND)
            rows_ND = shares_N[:, None] * rows_ND + (1 - shares_N)[:, None] * rows_ND[partners_N]
            targets_NN = mixed_targets(partners_N, shares_N)
        total = total + soft_recognition(unit(rows_ND) @ other_ND.T / temperature, targets_NN)
    return total / 2


def mixed_targets(partners_N: Tensor, shares_N: Tensor) -> Tensor:
    """``(N, N)`` with the share at the sample itself and the rest at its partner; rows sum to 1."""
    return shares_N.diag().scatter_add(-1, partners_N[:, None], (1 - shares_N)[:, None])


def soft_recognition(scores_NM: Tensor, targets_NM: Tensor) -> Tensor:
    """Mean cross-entropy of rows."""
    return mean(-(targets_NM * scores_NM.log_softmax(-1)).sum(-1))
