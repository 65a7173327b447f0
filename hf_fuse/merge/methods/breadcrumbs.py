"""Model Breadcrumbs: drop the largest changes as outliers and the small ones as noise, add up what is between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._election import add_up
from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._trim import band_thresholds, trimmed
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2312.06795"
SCALARS = "mean"
PASSES = 3


def measure(
    count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float], gamma: Sequence[float], precedence: str
) -> Measurement:
    return (yield from band_thresholds(numel, dtype, density, gamma, density_first=precedence == "density"))


def breadcrumbs(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.2,
    gamma: Annotated[PerModel, Between(0, 1)] = 0.1,
    lambda_: float = 0.4,
    normalize: bool = False,
    precedence: Literal["gamma", "density"] = "gamma",
    scope: Literal["tensor", "model"] = "tensor",
    state: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """``theta_0 + lambda * sum_k w_k mask_k tau_k``, the mask zero at both ends of |tau_k|.

    Args:
        deltas_KN: task vectors, N elements.
        weight: one number per model; all 1 in the paper.
        density: share to keep, after the outliers are gone: int(density * n) elements and at least one.
        gamma: share of the largest elements to drop. Elements equal to a threshold are kept.
        lambda_: common scale (alpha in the paper). 0.4, density 0.2 and gamma 0.1 are the example of the authors'
            README; the percentages in the paper's body are unverified.
        normalize: divide by the sum of the weights.
        precedence: what holds where gamma and density add up to more than everything.
        scope: thresholds of each tensor, or of the whole model. The authors' code has them per row of the last axis,
            which empties tensors with short rows.
        state: lowest and highest magnitude to keep.
    """
    lowest, highest = state
    values = trimmed(deltas_KN, lowest, weight, highest)
    return add_up(values, weight, normalize=normalize).mul_(lambda_)
