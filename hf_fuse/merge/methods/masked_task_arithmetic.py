"""Task arithmetic inside a learned mask: every element of all task vectors has a factor, besides the models' weights.

What defense-aware merging (``hf-fuse learn``, estimator ``defense_aware``) learns.
"""

from __future__ import annotations

from torch import Tensor

from hf_fuse.registry import PerModel

PAPER = "https://arxiv.org/abs/2410.13910"
STATISTICS = "mask"
CHUNKED_WEIGHTS = True


def masked_task_arithmetic(deltas_KN: Tensor, *, statistics: Tensor, weight: PerModel = 1.0) -> Tensor:
    """``theta_0 + sum_k w_k m * tau_k``.

    Args:
        deltas_KN: task vectors, N elements.
        statistics: the mask of each model, ``[K, N]``.
        weight: one number per model.
    """
    merged_N = deltas_KN[0] * statistics[0] * weight[0]
    for delta_N, mask_N, one in zip(deltas_KN[1:], statistics[1:], weight[1:]):
        merged_N += delta_N * mask_N * one
    return merged_N
