"""Task arithmetic with task vectors that are trimmed and freed of sign conflicts first, as in TIES, but not averaged.

What AdaMerging++ learns the weights of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.merge.methods._election import elected_sign
from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._trim import trimmed
from hf_fuse.merge.methods.ties import measure as measure_ties
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2310.02575"
PASSES = 4  # as TIES
CHUNKED_WEIGHTS = True


def measure(count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float]) -> Measurement:
    """State: the K trim thresholds, and the sign of elements whose votes cancel."""
    return (yield from measure_ties(count, numel, dtype, density=density, trim="paper", tie="majority"))


def vectors(deltas_KN: Tensor, *, state: tuple[Sequence[float], float]) -> list[Tensor]:
    """The K task vectors: only their large elements, and of those only the ones that have the elected sign."""
    thresholds, tied = state
    kept = trimmed(deltas_KN, thresholds, [1.0] * len(thresholds))
    sign_N = elected_sign(kept, tied)
    return [(row_N * sign_N).clamp_min_(0.0).mul_(sign_N) for row_N in kept]


def ties_task_arithmetic(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.2,
    state: tuple[Sequence[float], float],
) -> Tensor:
    """``theta_0 + sum_k w_k tau'_k``, tau' as TIES makes it of tau before its disjoint mean.

    Args:
        deltas_KN: task vectors, N elements.
        weight: one number per model, which has no part in the vote.
        density: share of each task vector to keep, by magnitude over the whole model.
        state: thresholds and the sign for ties.
    """
    merged_N = torch.zeros_like(deltas_KN[0])
    for row_N, one in zip(vectors(deltas_KN, state=state), weight):
        merged_N += row_N * one
    return merged_N
