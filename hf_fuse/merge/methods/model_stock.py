"""Model Stock: how far to go from the base towards the average, judged by the angle between the task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._products import gram

PAPER = "https://arxiv.org/abs/2403.19522"
MODELS = (2, None)
MEASURE_SCOPE = "tensor"


def unit(rows: bool) -> str:
    return "tensor" if rows else "element"


def measure(count: int, numel: int, dtype: torch.dtype) -> Measurement:
    return (yield from gram(count))


def model_stock(deltas_KN: Tensor, *, rows: bool = False, clamp: bool = True, state: Tensor | None = None) -> Tensor:
    """``theta_0 + t * mean_k tau_k`` with ``t = K c / (1 + (K - 1) c)``, c the mean pairwise cosine.

    Args:
        deltas_KN: task vectors, ``[K, N]`` (``[K, *shape]`` with ``rows``).
        rows: one t per row of a matrix instead of one per tensor.
        clamp: keep t in [0, 1]. Opposed task vectors would otherwise push away from the average, without bound.
        state: K x K inner products of the whole tensor.

    For K > 2 the paper speaks of the mean angle; cosines are averaged here. A zero task vector counts as perpendicular.
    """
    count = deltas_KN.shape[0]
    if not rows:
        norms = state.diagonal().sqrt()
        scale = norms[:, None] * norms[None, :]
        cosines = torch.where(scale > 0, state / scale.masked_fill(scale == 0, 1.0), 0.0)
        t = float(_ratio((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)), count, clamp))
        merged_N = deltas_KN[0] * (t / count)
        for k in range(1, count):
            merged_N.add_(deltas_KN[k], alpha=t / count)
        return merged_N
    rows_KRN = deltas_KN.reshape(count, -1, deltas_KN.shape[-1]) if deltas_KN.ndim > 2 else deltas_KN[:, None, :]
    norms = rows_KRN.norm(dim=-1, keepdim=True)
    units = rows_KRN / norms.masked_fill(norms == 0, 1.0)
    pairs = (units.sum(0).square().sum(-1) - units.square().sum((0, 2))) / (count * (count - 1))
    t = _ratio(pairs, count, clamp)
    return (rows_KRN.mean(0) * t[:, None]).reshape(deltas_KN.shape[1:])


def _ratio(cosine: Tensor, count: int, clamp: bool) -> Tensor:
    bottom = 1 + (count - 1) * cosine
    t = torch.where(bottom == 0, 0.0, count * cosine / bottom.masked_fill(bottom == 0, 1.0))
    # A negative denominator flips the sign of a strongly negative cosine: beyond the pole there is no useful ratio.
    return torch.where(bottom > 0, t, 0.0).clamp(0, 1) if clamp else t
