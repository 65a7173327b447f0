"""What the spectral methods share: thin SVD of any matrix, its rank, polar factors, and what is not a matrix.

A matrix ``[M, N]`` has ``min(M, N)`` singular triplets ``(u, s, v)``. Those whose s vanishes have arbitrary u and v, so
nothing may be made of them: all that follows stays within the span of the data (a LoRA delta has rank 8, not 4096).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Singular values up to this share of the largest count as zero: what fp32 arithmetic leaves of an exact zero.
RANK_TOLERANCE = 1e-6
# Whole task vectors that differ by less than this share are one: orthogonalising them would give full strength to a
# difference that is mere rounding.
SAME = 1e-3
# Likewise for directions, of which fp32 leaves so much more that a larger share would drop what the papers keep:
# strong directions that tasks nearly share.
SAME_DIRECTION = 1e-5

# Tensors that hold one row per token. Their SVD would be that of a vocabulary, not of a map between features.
VOCABULARY = (
    "embed_tokens", "word_embeddings", "token_embedding", "tok_embeddings", "wte", "embed_in", "shared.weight",
    "lm_head", "embed_out", "predictions.decoder",
)  # fmt: skip


def except_for(*parts: str) -> list[dict]:
    """A default for the option ``spectral``: off where one of ``parts`` is part of the tensor's name."""
    return [*({"filter": part, "value": False} for part in parts), {"value": True}]


class Triplets(NamedTuple):
    """``matrix = left @ diag(values) @ right``: R triplets, strongest first."""

    left_MR: Tensor
    values_R: Tensor
    right_RN: Tensor

    def product(self, values_R: Tensor | None = None) -> Tensor:
        """``left @ diag(values) @ right`` with these or other values, ``[M, N]``."""
        values_R = self.values_R if values_R is None else values_R
        return (self.left_MR * values_R) @ self.right_RN

    def first(self, count: int) -> Triplets:
        return Triplets(self.left_MR[:, :count], self.values_R[:count], self.right_RN[:count])


def thin_svd(matrix_MN: Tensor) -> Triplets:
    """All ``min(M, N)`` triplets, in the matrix's precision, whatever the unit of its numbers."""
    rows, columns = matrix_MN.shape
    # LAPACK is up to three times as fast on tall matrices. The eigenvectors of the small Gram matrix, in fp64 and with
    # the other side formed in fp64 too (in fp32 it would lose its orthogonality), are not faster than that.
    if rows < columns:
        left, values, right = thin_svd(matrix_MN.T)
        return Triplets(right.T, values, left.T)
    peak = float(matrix_MN.abs().amax()) if matrix_MN.numel() else 0.0
    # A power of two brings the numbers near 1: exact, and nothing below depends on their unit.
    scale = 2.0 ** -max(-120, min(120, math.frexp(peak)[1]))
    matrix_MN = matrix_MN * scale
    try:
        left, values, right = torch.linalg.svd(matrix_MN, full_matrices=False)
    except torch.linalg.LinAlgError:  # divide and conquer failed to converge, which fp64 nearly never does
        found = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
        left, values, right = (part.to(matrix_MN.dtype) for part in found)
    return Triplets(left, values / scale, right)


def triplets(matrix_MN: Tensor, tolerance: float = RANK_TOLERANCE, *, relative_to: float | None = None) -> Triplets:
    """The triplets with ``s > tolerance * largest s`` (or ``* relative_to``); none of a zero matrix."""
    found = thin_svd(matrix_MN)
    if not found.values_R.numel():
        return found
    largest = float(found.values_R[0]) if relative_to is None else relative_to
    return found.first(int((found.values_R > tolerance * largest).sum()))


def polar_factor(matrix_MN: Tensor, tolerance: float = SAME_DIRECTION) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows); for a singular one the partial isometry, which is zero
    where the matrix is. ``[M, N]``"""
    left_MR, _, right_RN = triplets(matrix_MN, tolerance)
    return left_MR @ right_RN


def orthogonal_product(stacks: Sequence[Triplets], values_R: Tensor, tolerance: float) -> Tensor:
    """``polar(U) diag(values) polar(V)`` for U and V made of the stacks' vectors side by side, ``[M, N]``.

    Singular values up to ``tolerance`` were noise, so vectors are no more certain than that.
    """
    tolerance = max(tolerance, SAME_DIRECTION)
    left_MR = polar_factor(torch.cat([stack.left_MR for stack in stacks], 1), tolerance)
    right_RN = polar_factor(torch.cat([stack.right_RN for stack in stacks], 0), tolerance)
    return (left_MR * values_R) @ right_RN


def weighted(deltas_KN: Tensor, weight: Sequence[float]) -> list[Tensor]:
    """``w_k tau_k`` of those models that change this tensor at all."""
    found = [delta if one == 1 else delta * one for delta, one in zip(deltas_KN, weight) if one]
    return [delta for delta in found if bool((delta != 0).any())]


def exact_total(matrices: Sequence[Tensor]) -> Tensor:
    """Their sum, rounded once: close singular values would make much of the order of the models."""
    total_MN = matrices[0].double()
    for matrix_MN in matrices[1:]:
        total_MN = total_MN + matrix_MN
    return total_MN.to(matrices[0].dtype)


def distinct(deltas: Sequence[Tensor]) -> list[Tensor]:
    """Without those that (nearly) repeat an earlier one."""
    found: list[tuple[Tensor, float]] = []
    for delta in deltas:
        norm = float(delta.norm(dtype=torch.float64))
        if all(
            float((delta - other).norm(dtype=torch.float64)) > SAME * max(norm, other_norm)
            for other, other_norm in found
        ):
            found.append((delta, norm))
    return [delta for delta, _ in found]


def by_matrix(
    deltas_KN: Tensor, weight: Sequence[float], spectral: bool, combine: Callable[[list[Tensor]], Tensor | None]
) -> Tensor:
    """``combine`` of the weighted matrices, and of everything else the mean of the weighted task vectors.

    Also averaged: matrices for which ``combine`` returns None, and what holds NaN or infinity, which has no SVD.
    """
    if spectral and deltas_KN.ndim == 3 and deltas_KN.numel() and bool(deltas_KN.sum().isfinite()):
        matrices = weighted(deltas_KN, weight)
        if not matrices:
            return torch.zeros_like(deltas_KN[0])
        merged_MN = combine(matrices)
        if merged_MN is not None:
            return merged_MN
    merged = torch.zeros_like(deltas_KN[0])
    share = 1 / (sum(1 for one in weight if one) or 1)
    for delta, one in zip(deltas_KN, weight):
        merged.add_(delta, alpha=one * share)
    return merged
