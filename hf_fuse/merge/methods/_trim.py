"""Trimming by magnitude: what lies between two thresholds stays. Shared by TIES, Breadcrumbs and their relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._threshold import kth_largest_magnitude


def trimmed(
    deltas: Sequence[Tensor], lowest: Sequence[float], weight: Sequence[float], highest: Sequence[float] | None = None
) -> list[Tensor]:
    """K rows: ``w_k tau_k`` where ``lowest_k <= |tau_k| <= highest_k``, else 0. May return the rows it was given."""
    rows = []
    for k, delta_N in enumerate(deltas):
        kept_N = delta_N
        if highest is not None and highest[k] < math.inf:
            kept_N = delta_N - hardshrink(delta_N, highest[k])  # x - x = 0 and x - 0 = x, exactly
        if lowest[k] > 0:
            # hardshrink keeps what is strictly larger, so it is given the next smaller number.
            zero = torch.zeros((), dtype=delta_N.dtype)
            kept_N = hardshrink(kept_N, float(torch.nextafter(zero + lowest[k], zero)))
        if weight[k] != 1:
            kept_N = kept_N * weight[k] if kept_N is delta_N else kept_N.mul_(weight[k])
        rows.append(kept_N)
    return rows


def band_thresholds(
    numel: int,
    dtype: torch.dtype,
    density: Sequence[float],
    gamma: Sequence[float] | None = None,
    *,
    density_first: bool = False,
) -> Measurement:
    """Thresholds that leave out the ``int(gamma n)`` largest and keep the ``int(density n)`` largest of the rest.

    At least one element is kept unless the density is 0, and elements equal to a threshold are all kept: never is a
    tensor emptied because its numbers are alike or few.

    Args:
        density_first: take away fewer of the largest, rather than keep fewer than the density says.

    Returns:
        K lowest and K highest magnitudes to keep.
    """
    lowest, highest = [0.0] * len(density), [math.inf] * len(density)
    asked: list[tuple[int, int, list[float]]] = []  # rank, model, where the answer goes
    for k, share in enumerate(density):
        if share <= 0:
            lowest[k] = math.inf
            continue
        keep = max(1, int(share * numel))
        top = int(gamma[k] * numel) if gamma else 0
        top = min(top, numel - keep if density_first else numel - 1)
        if top > 0:
            asked.append((top + 1, k, highest))
        if top + keep < numel:
            asked.append((top + keep, k, lowest))
    ranks, rows = [rank for rank, _, _ in asked], [k for _, k, _ in asked]
    found = (yield from kth_largest_magnitude(ranks, numel, dtype, rows=rows)) if asked else []
    for (_, k, place), value in zip(asked, found):
        place[k] = value
    return lowest, highest
