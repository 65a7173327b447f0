"""ICNN score: how well classes are told by nearest neighbours, from features and labels.

For comparing embeddings before a head is trained, as a number between 0 and 1. Takes N x N distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.errors import FuseError


@torch.no_grad()
def icnn(features_ND: Tensor, labels_N: Tensor, *, neighbours: int = 4) -> float:
    """Mean over samples of ``(l + g) / 2``: g the share of the same class among the k nearest, l the mean of
    1 - distance to the k nearest of the same class and of the distance to the k nearest of others, distances over the
    largest one.

    Which neighbours the published score averages distances over is not verified.

    Raises:
        FuseError: a class with one sample, or only one class.
    """
    _, class_N, counts_C = labels_N.unique(return_inverse=True, return_counts=True)
    if len(counts_C) < 2 or counts_C.min() < 2:
        raise FuseError(
            f"icnn: classes have {counts_C.tolist()} samples; expected two classes or more, of two samples each."
        )
    rows_ND = features_ND.double()
    distances_NN = torch.cdist(rows_ND, rows_ND)
    distances_NN = distances_NN / distances_NN.max().clamp(min=torch.finfo(torch.float64).tiny)
    itself_NN = torch.eye(len(rows_ND), dtype=torch.bool, device=rows_ND.device)
    same_NN = class_N[:, None] == class_N[None, :]
    nearest_NK = (
        distances_NN.masked_fill(itself_NN, torch.inf).topk(min(neighbours, len(rows_ND) - 1), largest=False).indices
    )
    same_share_N = same_NN.gather(-1, nearest_NK).double().mean(-1)
    near_N = 1 - _mean_of_nearest(distances_NN, same_NN & ~itself_NN, neighbours)
    far_N = _mean_of_nearest(distances_NN, ~same_NN, neighbours)
    return float((((near_N + far_N) / 2 + same_share_N) / 2).mean())


def _mean_of_nearest(distances_NN: Tensor, kept_NN: Tensor, neighbours: int) -> Tensor:
    """``(N,)``, over the k nearest of those that are kept, or as many as there are."""
    sorted_NN = distances_NN.masked_fill(~kept_NN, torch.inf).sort(-1).values[:, :neighbours]
    finite_NN = sorted_NN.isfinite()
    return torch.where(finite_NN, sorted_NN, 0).sum(-1) / finite_NN.sum(-1)
