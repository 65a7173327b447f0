"""RAM+ (tensor-local): RAM, with what only one model changed made stronger the more it shares with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.merge.methods._overlap import active, combine_by_overlap
from hf_fuse.merge.methods._passes import Measurement, Pass, Seen
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2601.13572"
SCALARS = "mean"
MEASURE_SCOPE = "tensor"


def measure(count: int, numel: int, dtype: torch.dtype, *, epsilon: float, r: float, alpha: float) -> Measurement:
    """State: K factors of the changes that a model made alone."""

    def add(block_KN: Tensor, total: Tensor, seen: Seen) -> None:
        _, masks, count_N = active(block_KN, epsilon)
        shared_N = count_N.sub(1.0).clamp_(0.0, 1.0)
        for k, mask_N in enumerate(masks):
            total[k, 0] += round(float(mask_N.sum()))
            total[k, 1] += round(float(mask_N.mul_(shared_N).sum()))

    counts = yield Pass(torch.zeros(count, 2, dtype=torch.int64), add)
    factors = []
    for changed, shared in counts.tolist():
        # Nothing of its own: the ratio is as large as can be, but nothing is left for it to act on.
        ratio = shared / (changed - shared) if changed > shared else alpha
        factors.append(1 + r * min(ratio, alpha))
    return factors


def ramplus_tl(
    deltas_KN: Tensor,
    *,
    r: float = 0.1,
    alpha: Annotated[float, Between(0)] = 0.2,
    epsilon: Annotated[float, Between(0)] = 1e-5,
    state: Sequence[float],
) -> Tensor:
    """RAM with a model's own changes times ``1 + r * min(shared / own, alpha)``, counted per tensor.

    Args:
        deltas_KN: task vectors, N elements.
        r: how much stronger.
        alpha: the largest ratio of shared to own changes that counts.
        epsilon: what counts as unchanged, in the unit of the weights.
        state: K factors.

    The tensor-local form is mergekit's; defaults are its own.
    """
    return combine_by_overlap(deltas_KN, epsilon, state)
