"""Mann-Whitney loss: every matching pair is to score above every other pair of the batch, of whichever query.

For dual encoders whose scores are compared across queries (a threshold, deduplication): InfoNCE only ranks the
candidates of one query.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from hf_fuse.losses._similarities import cosines, same_group
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2510.00137"
IN_BATCH = True
PAIRS_AT_A_TIME = 2**22


def mann_whitney(
    features_ND: Tensor,
    second_features_MD: Tensor,
    group_ids_N: Tensor | None = None,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 0.05,
) -> Tensor:
    """Mean over matching pairs i and other pairs k of ``softplus((s_k - s_i) / temperature)``, s a cosine.

    Divided by log 2 it bounds the area over the ROC curve. The mean is over all pairs of pairs, whatever their number
    (the paper's equation divides by N alone). It compares the samples of a batch: micro-batches are batches of their
    own, processes are taken together.

    Args:
        features_ND: queries.
        second_features_MD: what belongs to each; rows beyond N are hard negatives for all.
        group_ids_N: samples with the same id are no negatives of each other (duplicates, several right answers).
        temperature: the paper uses 0.01.
    """
    scores_NM = cosines(features_ND, second_features_MD)
    own_NN = same_group(group_ids_N, len(scores_NM), scores_NM.device)
    is_negative_NM = torch.ones_like(scores_NM, dtype=torch.bool)
    is_negative_NM[:, : len(scores_NM)] = ~own_NN
    return pairwise(scores_NM.diagonal(), scores_NM[is_negative_NM], temperature)


def pairwise(positives_P: Tensor, negatives_K: Tensor, temperature: float) -> Tensor:
    """Mean over P x K of the softplus; 0 without negatives. A part at a time: K grows with the square of the batch."""
    if not negatives_K.numel() or not positives_P.numel():
        return positives_P.sum() * 0

    def part(some_P: Tensor, negatives_K: Tensor) -> Tensor:
        return softplus((negatives_K[None, :] - some_P[:, None]) / temperature).sum()

    rows = max(1, PAIRS_AT_A_TIME // len(negatives_K))
    sums = [checkpoint(part, some, negatives_K, use_reentrant=False) for some in positives_P.split(rows)]
    return torch.stack(sums).sum() / (len(positives_P) * len(negatives_K))
