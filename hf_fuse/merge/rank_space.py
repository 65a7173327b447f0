"""Low-rank algebra: sums of factored changes, and the best change of a smaller rank, without large decompositions.

A change of a weight ``[m, n]`` is ``left_MR @ right_RN``. A sum of factored changes is a concatenation; its singular
values are those of a small core between two thin QR factors, so the dense sum is never formed. A dense change is cut
down by a randomised SVD (https://arxiv.org/abs/0909.4061) that only needs its product with thin matrices, so it may
be read in rows.

Shapes: M rows and N columns of the change, R rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 10  # columns drawn beyond the rank
POWER_ITERATIONS = 2  # each squares the ratio of wanted to unwanted singular values, for two more readings

# Rows of a change from the given one on; called again for each reading.
Rows = Callable[[], Iterable[tuple[int, Tensor]]]


@dataclass
class LowRankChange:
    """``left_MR @ right_RN``, what was left out squared, and the square of the whole change's Frobenius norm."""

    left_MR: Tensor
    right_RN: Tensor
    error: float = 0.0
    total: float = 0.0


def concatenated(parts: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """``(left, right)`` of ``sum_k c_k left_k @ right_k``, exactly: ranks add up, the numbers go into the left side.

    Args:
        parts: ``(left_k [M, R_k], right_k [R_k, N], c_k)``.
    """
    return torch.cat([left * factor for left, _, factor in parts], 1), torch.cat([right for _, right, _ in parts])


def truncated(left_MR: Tensor, right_RN: Tensor, rank: int) -> LowRankChange:
    """The best approximation of ``left @ right`` of at most ``rank``, as its SVD gives it, computed in the rank space.

    fp64 inside: the factors are thin, and what is lost by rounding stays far below what fp32 can hold.
    """
    left, right = left_MR.double(), right_RN.double()
    outer_MK, triangle_KR = torch.linalg.qr(left)
    other_NK, other_triangle_KR = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(triangle_KR @ other_triangle_KR.T, full_matrices=False)
    squares = values.square()
    root = values[:rank].sqrt()
    return LowRankChange(
        (outer_MK @ (u[:, :rank] * root)).to(left_MR.dtype),
        (root[:, None] * (v[:rank] @ other_NK.T)).to(right_RN.dtype),
        float(squares[rank:].sum()),
        float(squares.sum()),
    )


def squared_norm(left_MR: Tensor, right_RN: Tensor) -> float:
    """``||left @ right||_F^2`` from the two small Gram matrices."""
    left, right = left_MR.double(), right_RN.double()
    return float(((left.T @ left) * (right @ right.T)).sum())


def low_rank(
    rows: Rows,
    shape: tuple[int, int],
    rank: int,
    name: str,
    *,
    seed: int = 0,
    energy: float | None = None,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
) -> LowRankChange | None:
    """A change that is read in rows, cut down to ``rank``; None if it is zero.

    Args:
        rows: gives ``(first row, rows)`` in order, the same at each call; called ``2 + 2 * power_iterations`` times and
            once more to measure what was left out.
        shape: ``(M, N)`` of the change.
        rank: at most this many singular values are kept.
        name: of the tensor; with ``seed`` it determines the random start.
        energy: keep only as many as hold this share of the squared norm.
        oversampling: columns beyond ``rank`` in the iteration.
        power_iterations: more bring the error closer to the best possible one; two suffice.
    """
    m, n = shape
    width = min(rank + oversampling, m, n)
    whole = _whole(rows, m)
    if whole is not None and 2 * width >= min(m, n):
        left_vectors, values, right_vectors = torch.linalg.svd(whole, full_matrices=False)
        total = float(whole.double().square().sum())
    else:
        left_vectors, values, right_vectors, total = _randomised(rows, shape, width, name, seed, power_iterations)
    if total == 0:
        return None
    kept = rank if energy is None else _ranks_for(values, energy * total)
    kept = max(1, min(kept, rank, int((values > 0).sum())))
    root = values[:kept].sqrt()
    left_MR, right_RN = left_vectors[:, :kept] * root, root[:, None] * right_vectors[:kept]
    return LowRankChange(left_MR, right_RN, residual(rows, left_MR, right_RN), total)


def residual(rows: Rows, left_MR: Tensor, right_RN: Tensor) -> float:
    """``||change - left @ right||_F^2``, measured: differences of squared norms would drown small errors."""
    parts = []
    for first, block in rows():
        part = torch.addmm(block, left_MR[first : first + len(block)], right_RN, alpha=-1)
        parts.append(float(torch.linalg.vector_norm(part, dtype=torch.float64).square()))
    return math.fsum(parts)


def _whole(rows: Rows, m: int) -> Tensor | None:
    """The change if it comes in one piece."""
    first, block = next(iter(rows()))
    return block if first == 0 and len(block) == m else None


def _ranks_for(values: Tensor, wanted: float) -> int:
    sums = values.double().square().cumsum(0)
    return int((sums < wanted).sum()) + 1


def _randomised(
    rows: Rows, shape: tuple[int, int], width: int, name: str, seed: int, power_iterations: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """``(U [M, width], S, V [width, N], ||change||^2)``."""
    m, n = shape
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
    start_NK = torch.randn(n, width, generator=torch.Generator().manual_seed(key >> 1))
    squares: list[float] = []

    def times(thin_NK: Tensor, count: bool = False) -> Tensor:
        product_MK = thin_NK.new_empty(m, thin_NK.shape[1])
        for first, block in rows():
            torch.mm(block, thin_NK, out=product_MK[first : first + len(block)])
            if count:
                squares.append(float(torch.linalg.vector_norm(block, dtype=torch.float64).square()))
        return product_MK

    def transposed_times(thin_MK: Tensor) -> Tensor:
        product_NK = thin_MK.new_zeros(n, thin_MK.shape[1])
        for first, block in rows():
            product_NK.addmm_(block.T, thin_MK[first : first + len(block)])
        return product_NK

    first_block = next(iter(rows()))[1]
    basis_MK = torch.linalg.qr(times(start_NK.to(first_block), count=True))[0]
    for _ in range(power_iterations):
        basis_MK = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis_MK))[0]))[0]
    other_NK, triangle_KK = torch.linalg.qr(transposed_times(basis_MK))
    # change ~ basis @ (other @ triangle)^T, and the triangle is small enough for an exact SVD
    u, values, v = torch.linalg.svd(triangle_KK.T)
    return basis_MK @ u, values, v @ other_NK.T, math.fsum(squares)
