"""Separability of unlabelled features, from the lengths of their minimum spanning tree; to stop training without
labels.

Where there are clusters, a tree that joins all samples has a few long edges, one less than there are clusters. The
exact form of the published criterion could not be verified; this is a proxy.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from hf_fuse.errors import FuseError

LARGEST = 2000  # samples; time and memory grow with their square


def separability(features_ND: Tensor, clusters: int, *, seed: int = 0) -> float:
    """Mean of the ``clusters - 1`` longest edges over the mean of the others. Of more than 2000 samples, a draw is
    used.

    Raises:
        FuseError: too few samples for that many clusters, or all of them equal.
    """
    if not 2 <= clusters < len(features_ND):
        raise FuseError(
            f"separability: {clusters} clusters of {len(features_ND)} samples; expected 2 or more, and fewer."
        )
    draw = torch.randperm(len(features_ND), generator=torch.Generator().manual_seed(seed))[:LARGEST]
    rows = features_ND.detach().double().cpu()[draw.sort().values]
    # Single linkage joins clusters along the edges of the minimum spanning tree, equal samples at distance 0.
    edges = np.sort(linkage(rows.numpy(), "single")[:, 2])
    longest, rest = edges[-(clusters - 1) :], edges[: -(clusters - 1)]
    if not rest.mean() > 0:
        raise FuseError("separability: the samples of a cluster are all equal. Look at the features.")
    return float(longest.mean() / rest.mean())
