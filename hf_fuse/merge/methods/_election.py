"""The sign step that TIES, DARE-TIES and their relatives share: elect a sign per element, combine what agrees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POSITIVE, NEGATIVE = 1.0, -1.0


def sign_balance(values_KN: Tensor) -> Tensor:
    """Number of elements whose sum over models is positive minus that of negative ones: ``int64 []``."""
    return values_KN.sum(0).sign().sum(dtype=torch.float64).to(torch.int64)


def combine_agreeing(values_KN: Tensor, weight: Sequence[float], *, tied: float, normalize: bool) -> Tensor:
    """Sum over models of the values that have the elected sign, ``[N]``.

    Args:
        values_KN: differences already multiplied by their weights.
        weight: K weights; with ``normalize`` the sum is divided by the weights of the models that agree and are not
            zero there (1 each: the disjoint mean of the TIES paper).
        tied: sign of elements whose values cancel exactly, +1 or -1.
    """
    sign_N = values_KN.sum(0).sign_().add_(0.5 * tied).sign_()
    agreeing_KN = (values_KN * sign_N).clamp_min_(0.0)
    merged_N = agreeing_KN.sum(0).mul_(sign_N)
    if not normalize:
        return merged_N
    present_KN = agreeing_KN.sign_()
    share_N = present_KN[0] * weight[0]
    for k in range(1, len(weight)):
        share_N.add_(present_KN[k], alpha=weight[k])
    if min(weight) > 0:  # nobody agrees only where the sum is zero anyway
        return merged_N.div_(share_N.clamp_min_(torch.finfo(share_N.dtype).tiny))
    return torch.where(share_N == 0, merged_N, merged_N / share_N)
