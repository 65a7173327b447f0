"""Means of directions, worked out on inner products alone: every mean here is a combination of the K vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse.errors import RecipeError


def shares(weight: Sequence[float], method: str) -> list[float]:
    """Weights that sum to 1.

    Raises:
        RecipeError: they sum to 0.
    """
    total = sum(weight)
    if total == 0:
        raise RecipeError(f"{method}: the weights sum to 0, so they can't be normalised. Change one.")
    return [w / total for w in weight]


def combine(vectors_KN: Tensor, factors: Sequence[float]) -> Tensor:
    """``sum_k factors_k v_k``, ``[N]``."""
    merged_N = vectors_KN[0] * factors[0]
    for vector_N, factor in zip(vectors_KN[1:], factors[1:]):
        merged_N.add_(vector_N, alpha=factor)
    return merged_N


def norms_and_cosines(products: Tensor) -> tuple[Tensor, Tensor]:
    """Of K vectors, from their inner products; a zero vector has cosine 0 with all. ``fp64 [K], [K, K]``"""
    norms = products.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms.masked_fill(norms == 0, 1.0), 0.0)
    cosines = (products * inverse[:, None] * inverse[None, :]).clamp(-1, 1)
    cosines.diagonal().copy_((norms > 0).double())
    return norms, cosines


def karcher_direction(cosines: Tensor, alpha: Tensor, max_iter: int, tol: float) -> Tensor:
    """Coefficients, on unit vectors, of the unit vector with the least weighted sum of squared angles to them.

    Args:
        cosines: between the K unit vectors.
        alpha: K weights.
        max_iter: steps at most.
        tol: angle at which to stop; it also tells parallel and opposite vectors, which have no way to each other.
    """
    mean = alpha / alpha.sum()
    norm = _norm(mean, cosines)
    if norm < tol:  # they balance out: any start is as good
        mean, norm = torch.zeros_like(mean), 1.0
        mean[0] = 1.0
    mean = mean / norm
    for _ in range(max_iter):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle, sine = cosine.acos(), (1 - cosine.square()).sqrt()
        pull = torch.where(sine > tol, alpha * angle / sine.clamp_min(tol), torch.where(angle < 1, alpha, 0.0))
        tangent = pull - (pull * cosine).sum() * mean
        length = _norm(tangent, cosines)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / _norm(mean, cosines)
    return mean


def _norm(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))
