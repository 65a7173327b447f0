"""DARE's step: drop elements of the task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass, Seen
from hf_fuse.merge.methods._random import TensorRandom


def drop(model: int, delta_N: Tensor, density: float, random: TensorRandom) -> tuple[Tensor, float]:
    """``mask * tau``, and the probability with which elements were kept."""
    mask_N, kept = random.keep(model, density, delta_N)
    return mask_N.mul_(delta_N), kept


def l1_factors(count: int, dropped: Callable[[int, Tensor, Seen], Tensor]) -> Measurement:
    """K factors that restore the L1 norm each tensor had before dropping (mergekit's rescaling).

    Args:
        dropped: (model, its part of a block, what the block belongs to) -> the part without what is dropped.
    """

    def add(block_KN: Tensor, total: Tensor, seen: Seen) -> None:
        for k, delta_N in enumerate(block_KN):
            total[k, 0] += delta_N.abs().sum().item()
            total[k, 1] += dropped(k, delta_N, seen).abs_().sum().item()

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
        kept_N, share = drop(k, delta_N, density[k], random)
        factor = 1 / share if share and rescale == "expectation" else 1.0
        rows.append(kept_N.mul_((factor if factors is None else factors[k]) * weight[k]))
    return rows
