"""Karcher mean: the centre of the models' directions on the sphere, each tensor one vector, at their mean length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._products import gram
from hf_fuse.merge.methods._sphere import combine, karcher_direction, norms_and_cosines, shares
from hf_fuse.registry import Between, PerModel

PAPER = None  # a community method; the mean is H. Karcher's (Comm. Pure Appl. Math. 30, 1977)
SCALARS = "mean"
MEASURE_SCOPE = "tensor"


def check(weight: Sequence[float]) -> None:
    shares(weight, "karcher")


def measure(count: int, numel: int, dtype: torch.dtype) -> Measurement:
    return (yield from gram(count))


def karcher(
    models_KN: Tensor,
    *,
    weight: Annotated[PerModel, Between(0)] = 1.0,
    max_iter: Annotated[int, Between(0)] = 10,
    tol: Annotated[float, Between(0, 1)] = 1e-5,
    state: Tensor,
) -> Tensor:
    """``(sum_k w_k |v_k|) u``, u the unit vector with the least ``sum_k w_k angle(u, v_k)^2``.

    Args:
        models_KN: weights of K models, N elements.
        weight: one number per model, normalised; mergekit has them all equal.
        max_iter: steps of the iteration at most.
        tol: angle in radians at which it stops. Tensors whose length is at most this fraction of the longest have no
            say in the direction (their length still counts).
        state: K x K inner products of the whole tensor, which are all that the iteration needs.

    Vectors that balance out have no centre; the first one's direction is taken then.
    """
    alpha = torch.tensor(shares(weight, "karcher"), dtype=torch.float64)
    norms, cosines = norms_and_cosines(state)
    factors = torch.zeros_like(norms)
    has_say = (norms > tol * norms.max()) & (alpha > 0)
    if has_say.any():
        direction = karcher_direction(cosines[has_say][:, has_say], alpha[has_say], max_iter, tol)
        factors[has_say] = (alpha @ norms) * direction / norms[has_say]
    return combine(models_KN, factors.tolist())
