"""NuSLERP: spherical interpolation of two models or of their task vectors, by weights instead of a position."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._products import gram
from hf_fuse.merge.methods.slerp import arc_weights
from hf_fuse.registry import PerModel

PAPER = None  # a community method; the curve is Shoemake's (see slerp)
MODELS = (2, 2)
SCALARS = "mean"
MEASURE_SCOPE = "tensor"


def unit(axis: str) -> str:
    return "element" if axis == "tensor" else "tensor"


def measure(count: int, numel: int, dtype: torch.dtype) -> Measurement:
    return (yield from gram(count))


def nuslerp(
    vectors_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    axis: Literal["tensor", "rows", "columns"] = "tensor",
    state: Tensor | None = None,
) -> Tensor:
    """SLERP at ``t = w_1 / (w_0 + w_1)`` (0.5 if the weights cancel), without a switch to linear interpolation.

    Args:
        vectors_KN: two models, or their task vectors if the recipe has a base; ``[2, N]`` or ``[2, *shape]``.
        weight: one number per model.
        axis: what counts as one vector: the whole tensor, each row of a ``[out, in]`` matrix, or each column. 1-D
            tensors are one vector always. (mergekit: ``nuslerp_row_wise: true`` means our ``columns``.)
        state: 2x2 inner products of the whole tensor, for ``axis: tensor``.
    """
    total = weight[0] + weight[1]
    t = weight[1] / total if abs(total) > 1e-6 * max(map(abs, weight)) else 0.5
    if axis == "tensor":
        first, second = arc_weights(state, t, threshold=2.0)
        return (vectors_KN[0] * first).add_(vectors_KN[1], alpha=second)
    v0, v1 = vectors_KN[0], vectors_KN[1]
    dim = -1 if axis == "rows" or v0.ndim == 1 else 0
    norms = v0.norm(dim=dim, keepdim=True) * v1.norm(dim=dim, keepdim=True)
    cosine = (v0 * v1).sum(dim, keepdim=True) / norms.masked_fill(norms == 0, math.inf)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    straight = sine < 1e-8
    sine = sine.masked_fill(straight, 1.0)
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(straight, t, torch.sin(t * angle) / sine)
    return v0 * first + v1 * second
