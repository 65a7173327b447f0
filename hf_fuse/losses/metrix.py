"""Metrix: metric learning on mixed embeddings, which are positive in part and negative in part.

For retrieval with labels, beside or instead of ``sup_con``, when embeddings of unseen classes matter. Mixes embeddings,
the cheapest of the paper's levels: no further forward pass.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._draws import random_of_step
from hf_fuse.losses._predictions import sample_classes
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._similarities import unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2106.04990"
IN_BATCH = True
MEAN_OVER = "samples"


def metrix(
    features_ND: Tensor,
    labels_N: Tensor,
    step: int = 0,
    *,
    mixed: Annotated[float, Between(0)] = 0.4,
    margin: Annotated[float, Between(0)] = 0.5,
    alpha: Annotated[float, Between(0, open_low=True)] = 2.0,
    seed: int = 0,
) -> Tensor:
    """The contrastive loss on distances of unit rows, plus ``mixed`` times that of mixed partners:
    ``mean of l D(a, v) + (1 - l) [margin - D(a, v)]_+`` with ``v = l x + (1 - l) n``, brought to length 1.

    n is a sample of another class, x another one of the anchor's class or the anchor itself; which of the two, and l
    from Beta(alpha, alpha), are drawn once per step, and the samples for each anchor. The first part is the mean
    distance of pairs of one class plus the mean ``[margin - D]_+`` of the others. It compares the samples of a batch:
    micro-batches are batches of their own, processes are taken together.

    Args:
        features_ND: embeddings.
        labels_N: class indices.
        step: number of the optimizer step.
        mixed: weight of the mixed part; 0: the contrastive loss.
        margin: how far classes are to be apart, at most 2.
        alpha: of the beta distribution.
        seed: of the draws.
    """
    unit_ND, labels_N = gathered(unit(features_ND)), gathered(sample_classes(labels_N, features_ND))
    same_NN = labels_N[:, None] == labels_N[None, :]
    positive_NN = same_NN & ~torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    distances_NN = _distances(unit_ND[:, None], unit_ND[None])
    clean = _mean(distances_NN, positive_NN) + _mean((margin - distances_NN).clamp(min=0), ~same_NN)
    random = random_of_step(seed, step)
    share, with_itself = random.beta(alpha, alpha), random.random() < 0.5
    order_NN = torch.from_numpy(random.random(same_NN.shape)).to(unit_ND)
    negative_N = order_NN.masked_fill(same_NN, -1).argmax(-1)
    partner_N = order_NN.masked_fill(~positive_NN, -1).argmax(-1)
    partner_ND = unit_ND if with_itself else unit_ND[partner_N]
    between_ND = unit(share * partner_ND + (1 - share) * unit_ND[negative_N])
    distance_N = _distances(unit_ND, between_ND)
    loss_N = share * distance_N + (1 - share) * (margin - distance_N).clamp(min=0)
    return clean + mixed * _mean(loss_N, positive_NN.any(-1) & ~same_NN.all(-1))


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # The root has no slope at 0, where a sample meets itself.
    return ((first - second).square().sum(-1) + 1e-12).sqrt()


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values, 0).sum() / kept.sum().clamp(min=1)
