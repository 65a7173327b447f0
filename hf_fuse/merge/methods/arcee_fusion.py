"""Arcee Fusion: take over the most important changes of one model, the outliers of size times divergence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_fuse.merge.methods._passes import Measurement, Seen
from hf_fuse.merge.methods._threshold import kth_largest_magnitude

PAPER = None  # described in mergekit's documentation only
MODELS = (1, 1)
SCALARS = "mean"
UNIT = "rows"
MEASURE_SCOPE = "tensor"


def measure(count: int, numel: int, dtype: torch.dtype) -> Measurement:
    """State: the least importance to take over."""
    if numel == 0:
        return 0.0

    def values(block_KRC: Tensor, seen: Seen, least: Sequence[float]) -> list[Tensor]:
        return [_importance(block_KRC[0], seen.base).reshape(-1)]

    ranks = [numel - int(share * (numel - 1)) for share in (0.25, 0.5, 0.75)]
    lower, median, upper = yield from kth_largest_magnitude(ranks, numel, dtype, rows=[0, 0, 0], values=values)
    return median + 1.5 * (upper - lower)


def arcee_fusion(deltas_KN: Tensor, *, state: float, base: Tensor) -> Tensor:
    """``theta_0 + tau * [importance >= median + 1.5 (Q3 - Q1)]``, quartiles over the tensor.

    The importance of an element is |tau| times the Kullback-Leibler divergence between the softmaxes of its row before
    and after, ``KL(softmax(theta) || softmax(theta_0))``. The quartiles are exact; mergekit samples large tensors.

    Args:
        deltas_KN: the task vector of the one model, ``[1, R, C]``.
        state: the threshold.
        base: the base's weights, ``[R, C]``.
    """
    delta_RC = deltas_KN[0]
    importance_RC = _importance(delta_RC, base)
    if state <= 0:
        return delta_RC.clone()
    zero = torch.zeros((), dtype=importance_RC.dtype)
    just_below = float(torch.nextafter(zero + state, zero))
    return hardshrink(importance_RC, just_below).sign_().mul_(delta_RC)


def _importance(delta_RC: Tensor, base_RC: Tensor) -> Tensor:
    """``|tau| * KL(softmax(theta_0 + tau) || softmax(theta_0))``, the divergence of each row.

    With p the softmax before, y = tau - E_p[tau] and q = exp(y) - 1 - y it is ``E_p[y^2 + y q] / (1 + E_p[q]) -
    log(1 + E_p[q])``: sums of squares, where the difference of two logarithms would be lost in fp32's rounding.
    """
    before_RC = base_RC.softmax(-1)
    y_RC = delta_RC - (before_RC * delta_RC).sum(-1, keepdim=True)
    square_RC = y_RC * y_RC
    # The series is right to fp32's last bits for small changes, where exp(y) - 1 - y is not.
    q_RC = (y_RC / 120).add_(1 / 24).mul_(y_RC).add_(1 / 6).mul_(y_RC).add_(0.5).mul_(square_RC)
    large_R = y_RC.abs().amax(-1) > 0.03
    if large_R.any():
        q_RC[large_R] = y_RC[large_R].expm1() - y_RC[large_R]
    spread = (before_RC * square_RC.addcmul_(y_RC, q_RC)).sum(-1, keepdim=True)
    growth = (before_RC * q_RC).sum(-1, keepdim=True)
    divergence = (spread / (1 + growth) - growth.log1p()).clamp_min_(0.0)
    return delta_RC.abs() * divergence
