"""Prototype triplet: a sample is nearer to the mean of its class than to any other class's, by a margin.

For few-shot classes that are told by nearest means afterwards. Draw batches with at least two samples per class; a
sample that is alone in its class has no mean to compare with.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._predictions import sample_classes
from hf_fuse.losses._processes import gathered
from hf_fuse.registry import Between

IN_BATCH = True
MEAN_OVER = "samples"


def proto_triplet(features_ND: Tensor, labels_N: Tensor, *, margin: Annotated[float, Between(0)] = 0.5) -> Tensor:
    """Mean of ``[d(x, mean of its class) - min over other classes of d(x, mean) + margin]_+``, d Euclidean.

    Means are those of the batch; of a sample's own class, that of the others. It compares the samples of a batch:
    micro-batches are batches of their own, processes are taken together.

    Args:
        features_ND: embeddings.
        labels_N: class indices.
        margin: in units of the features.
    """
    rows_ND, labels_N = gathered(features_ND.float()), gathered(sample_classes(labels_N, features_ND))
    classes_C, class_N = labels_N.unique(return_inverse=True)
    member_NC = class_N[:, None] == torch.arange(len(classes_C), device=labels_N.device)
    sums_CD, counts_C = member_NC.to(rows_ND).T @ rows_ND, member_NC.sum(0)
    others_ND = (sums_CD[class_N] - rows_ND) / (counts_C[class_N] - 1).clamp(min=1)[:, None]
    distances_NC = _distances(rows_ND[:, None], sums_CD / counts_C[:, None])
    own_NC = _distances(rows_ND, others_ND)[:, None].expand_as(distances_NC)
    kept_N = (counts_C[class_N] > 1) & (len(classes_C) > 1)
    loss_N = triplets(torch.where(member_NC, own_NC, distances_NC), class_N, margin)
    return torch.where(kept_N, loss_N, 0).sum() / kept_N.sum().clamp(min=1)


def triplets(distances_NC: Tensor, class_N: Tensor, margin: float) -> Tensor:
    """The loss ``(N,)`` of distances to each class."""
    own_N1 = distances_NC.gather(-1, class_N[:, None])
    others_NC = distances_NC.scatter(-1, class_N[:, None], torch.finfo(distances_NC.dtype).max)
    return (own_N1.squeeze(-1) - others_NC.min(-1).values + margin).clamp(min=0)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return ((first - second).square().sum(-1) + 1e-6).sqrt()
