"""SCE (FuseChat): select where models differ most, weigh them by their energy there, erase minority signs."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.merge.methods._election import POSITIVE, combine_agreeing, elected_sign, total_of
from hf_fuse.merge.methods._passes import Measurement, Pass, Seen
from hf_fuse.merge.methods._products import energies
from hf_fuse.merge.methods._threshold import kth_largest_magnitude, places_from
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2408.07990"
SCALARS = "mean"
MODELS = (2, None)
MEASURE_SCOPE = "tensor"
PASSES = 4


def measure(count: int, numel: int, dtype: torch.dtype, *, density: float) -> Measurement:
    """State: the least variance to select, and K weights."""
    least = 0.0
    if density <= 0:
        least = math.inf
    elif density < 1:
        (least,) = yield from kth_largest_magnitude(
            [density], numel, dtype, of_nonzero=True, values=lambda block_KN, seen, least: [_variance(block_KN)]
        )

    def add(block_KN: Tensor, total: Tensor, seen: Seen) -> None:
        total += energies(_selected(block_KN, least)[1])

    energy = yield Pass(torch.zeros(count, dtype=torch.float64), add)
    whole = float(energy.sum())
    return least, (energy / whole).tolist() if whole > 0 else [1 / count] * count


def sce(
    deltas_KN: Tensor,
    *,
    density: Annotated[float, Between(0, 1)] = 0.1,
    state: tuple[float, list[float]],
) -> Tensor:
    """``theta_0 + sum_k eta_k tau_k / sum_k eta_k`` over the models that have the elected sign.

    Args:
        deltas_KN: task vectors, N elements.
        density: share of the positions to merge, those where the models' variance is largest, of all where it is not
            zero, and at least one. The others stay at the base; 1 merges all. FuseChat-7B used 0.1, FuseO1 1.
        state: the least variance to select, and the weights eta: mean squares of the selected task vectors, normalised.

    Positions whose variance equals the threshold are all selected. Where models agree there is no variance: below
    density 1 nothing of identical models is merged. Votes that cancel count as positive. The selection holds for all
    three steps, as the name says and mergekit does; the authors' merging code uses it for the weights only, and the
    paper's body is unverified.
    """
    least, weights = state
    places, values = _selected(deltas_KN, least)
    sign_M = elected_sign(values, POSITIVE)
    weighed = [value_M * weight for value_M, weight in zip(values, weights)]
    merged_M = combine_agreeing(weighed, weights, tied=POSITIVE, normalize=True, sign_N=sign_M)
    return merged_M if places is None else torch.zeros_like(deltas_KN[0]).index_copy_(0, places, merged_M)


def _variance(deltas_KN: Tensor) -> Tensor:
    """Population variance over models, ``[N]``; exactly zero where all are equal."""
    count = deltas_KN.shape[0]
    rest = [delta_N - deltas_KN[0] for delta_N in deltas_KN[1:]]
    mean_N = total_of(rest).div_(count)
    variance_N = mean_N.square()
    for delta_N in rest:
        variance_N.addcmul_(delta_N.sub_(mean_N), delta_N)
    return variance_N.div_(count)


def _selected(deltas_KN: Tensor, least: float) -> tuple[Tensor | None, list[Tensor]]:
    """Positions whose variance is at least ``least``, None for all, and the K task vectors there."""
    if least == 0:
        return None, list(deltas_KN)
    places = places_from(_variance(deltas_KN), least)
    return places, [delta_N.index_select(0, places) for delta_N in deltas_KN]
