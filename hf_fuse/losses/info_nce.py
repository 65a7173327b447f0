"""InfoNCE: each sample is to recognise its second view among those of the whole batch.

For sentence and image embeddings, from two dropout passes (SimCSE) or from pairs in the columns ``second_*`` (queries
and passages). The smaller the temperature, the more the hardest negatives count.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._predictions import mean
from hf_fuse.losses._similarities import cosines, same_group
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2012.09740"
IN_BATCH = True


def info_nce(
    features_ND: Tensor,
    second_features_MD: Tensor,
    group_ids_N: Tensor | None = None,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 0.05,
    symmetric: bool = False,
    hardest: Annotated[int, Between(0)] = 0,
) -> Tensor:
    """Mean of ``-log(e^(s_ii / t) / sum_k e^(s_ik / t))``, s a cosine.

    It compares the samples of a batch: micro-batches are batches of their own, processes are taken together.
    :func:`hf_fuse.diagnostics.similarities.similarity_statistics` tells how the negatives are spread.

    Args:
        features_ND: queries, or first views.
        second_features_MD: what belongs to each; rows beyond N are hard negatives for all.
        group_ids_N: samples with the same id are no negatives of each other.
        temperature: t.
        symmetric: the mean with the loss that looks for the first view among the first views.
        hardest: so many negatives per sample, the most similar ones; 0: all.
    """
    scores_NM = cosines(features_ND, second_features_MD) / temperature
    count = len(scores_NM)
    own_NN = same_group(group_ids_N, count, scores_NM.device)
    loss = _recognition(scores_NM, own_NN, hardest)
    if symmetric:
        loss = (loss + _recognition(scores_NM[:, :count].T, own_NN, hardest)) / 2
    return loss


def _recognition(scores_NM: Tensor, own_NN: Tensor, hardest: int) -> Tensor:
    excluded_NM = torch.zeros_like(scores_NM, dtype=torch.bool)
    excluded_NM[:, : len(own_NN)] = own_NN
    # The lowest number and not -inf: without negatives its log-sum has no gradient.
    negatives_NM = scores_NM.masked_fill(excluded_NM, torch.finfo(scores_NM.dtype).min)
    if 0 < hardest < negatives_NM.shape[-1]:
        negatives_NM = negatives_NM.topk(hardest, dim=-1).values
    positives_N = scores_NM.diagonal()
    return mean(torch.nn.functional.softplus(negatives_NM.logsumexp(-1) - positives_N))
