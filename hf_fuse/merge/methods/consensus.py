"""Consensus Merging: of the summed task vectors, keep what matters to at least two tasks by their TALL-masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._masks import multitask_vector, task_mask
from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._trim import band_thresholds
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2405.07813"
SCALARS = "mean"
PASSES = 1  # more below density 1


def measure(count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float]) -> Measurement:
    if min(density) >= 1:
        return None
    return (yield from band_thresholds(numel, dtype, density))[0]


def consensus(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    mask_scale: Annotated[PerModel, Between(0)] = 0.4,
    agreement: Annotated[int, Between(0)] = 2,
    lambda_: float = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 1.0,
    election: bool = False,
    scope: Literal["model", "tensor"] = "model",
    state: Sequence[float] | None,
) -> Tensor:
    """``theta_0 + lambda * tau_M * [at least ``agreement`` tasks have |tau_k| > mask_scale * |tau_M - tau_k|]``.

    Args:
        deltas_KN: task vectors, N elements.
        weight: factor of each task vector, in all that follows; all 1 in the paper.
        mask_scale: lambda of the masks, larger means sparser. The authors choose it per task from 0.2 to 0.6 on
            validation data; 0.4 without any.
        agreement: how many tasks must need an element. 1 drops what no task needs, 2 (the paper) also what only one
            does; more than there are models means all of them.
        lambda_: scale of the merged task vector; the paper chooses from 0.1 to 1 on validation data.
        density: trim each task vector to its largest elements before they are added up; 1 leaves them whole.
        election: add up only elements of the elected sign. With density 0.2, Consensus TIES of the paper.
        scope: trim over the whole model, or within each tensor.
        state: trim thresholds.
    """
    count = deltas_KN.shape[0]
    multitask_N = multitask_vector(deltas_KN, weight, state, election)
    needed_N = torch.zeros_like(multitask_N)
    for delta_N, one, scale in zip(deltas_KN, weight, mask_scale):
        needed_N.add_(task_mask(delta_N if one == 1 else delta_N * one, multitask_N, scale))
    keep_N = needed_N.sub_(min(agreement, count) - 0.5).sign_().clamp_min_(0.0)
    return multitask_N.mul_(keep_N).mul_(lambda_)
