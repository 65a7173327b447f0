"""Magnitude sparsification: keep only the largest changes of each model, then add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._election import add_up
from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._trim import band_thresholds, trimmed
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/1506.02626"
SCALARS = "mean"
PASSES = 3


def measure(count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float]) -> Measurement:
    return (yield from band_thresholds(numel, dtype, density))


def magnitude(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.2,
    lambda_: float = 1.0,
    normalize: bool = False,
    scope: Literal["tensor", "model"] = "tensor",
    state: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """``theta_0 + lambda * sum_k w_k top(tau_k)``: TIES without its vote.

    Args:
        deltas_KN: task vectors, N elements.
        weight: one number per model.
        density: share of each task vector to keep, int(density * n) elements and at least one; elements equal to the
            threshold are all kept.
        lambda_: common scale.
        normalize: divide by the sum of the weights.
        scope: keep the largest of each tensor, or of the whole model.
        state: thresholds.
    """
    lowest, _ = state
    return add_up(trimmed(deltas_KN, lowest, weight), weight, normalize=normalize).mul_(lambda_)
