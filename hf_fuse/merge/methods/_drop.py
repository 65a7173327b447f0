"""DARE's step: drop elements of the task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass, Seen
from hf_fuse.merge.methods._random import TensorRandom


def l1_factors(count: int, density: Sequence[float]) -> Measurement:
    """K factors that restore the L1 norm each tensor had before dropping (mergekit's rescaling)."""

    def add(block_KN: Tensor, total: Tensor, seen: Seen) -> None:
        for k in range(count):
            mask_N, _ = seen.random.keep(k, density[k], block_KN[k])
            magnitude_N = block_KN[k].abs()
            total[k, 0] += magnitude_N.sum().item()
            total[k, 1] += (magnitude_N * mask_N).sum().item()

    sums = yield Pass(torch.zeros(count, 2, dtype=torch.float64), add)
    return [float(before / after) if after > 0 else 1.0 for before, after in sums]


def drop_and_rescale(
    deltas_KN: Tensor,
    weight: Sequence[float],
    density: Sequence[float],
    random: TensorRandom,
    *,
    rescale: str,
    factors: Sequence[float] | None = None,
) -> list[Tensor]:
    """K rows ``w_k * f_k * mask_k * tau_k``, f = 1/density (expectation), the given L1 factors, or 1."""
    rows = []
    for k, delta_N in enumerate(deltas_KN):
        mask_N, kept = random.keep(k, density[k], delta_N)
        if factors is not None:
            factor = factors[k]
        else:
            factor = 1 / kept if kept and rescale == "expectation" else 1.0
        rows.append(mask_N.mul_(factor * weight[k]).mul_(delta_N))
    return rows
