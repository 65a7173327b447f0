"""Iso-CTS: common directions of the summed task vectors beside directions of each task, all equally strong."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.merge.methods._spectral import (
    RANK_TOLERANCE,
    VOCABULARY,
    by_matrix,
    exact_total,
    except_for,
    orthogonal_product,
    triplets,
)
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2502.04959"
DEFAULTS = {"spectral": except_for("text_projection", *VOCABULARY)}


def unit(spectral: bool) -> str:
    return "tensor" if spectral else "element"


def iso_cts(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
    common_space_fraction: Annotated[float, Between(0, 1)] = 0.8,
    spectral: bool = True,
    tolerance: Annotated[float, Between(0, 1)] = RANK_TOLERANCE,
) -> Tensor:
    """``theta_0 + lambda * mean(S) polar(U) polar(V)``: triplets of the sum, and of each task beside the sum's.

    Args:
        deltas_KN: task vectors, ``[K, *shape]``. What is not a matrix is averaged, as in the paper.
        weight: factor of each task vector; all 1 in the paper.
        lambda_: scale of the merged task vector; the paper searches 0.1 to 3 on validation data, 1 without
            (unverified).
        common_space_fraction: share of the directions that the sum gets; the tasks share the rest evenly. With 1, or
            too few directions for all tasks, this is Iso-C.
        spectral: treat this matrix by its singular vectors, or average it. By default all but embeddings, language
            model heads and CLIP's text_projection.
        tolerance: singular values up to this share of the largest count as zero and their directions are left out;
            directions that tasks share up to this share are one.

    The directions that are shared out are those of the sum: its rank, not the size of the matrix.
    """

    def combine(matrices: list[Tensor]) -> Tensor:
        total_MN = exact_total(matrices)
        common = triplets(total_MN, tolerance)
        each = directions_per_task(len(common.values_R), len(matrices), common_space_fraction)
        common = common.first(len(common.values_R) - each * len(matrices))
        parts = [*(_own(matrix_MN, common.left_MR, each, tolerance) for matrix_MN in matrices if each), common]
        values_R = torch.cat([part.values_R for part in parts])
        if not len(values_R):  # the task vectors cancel
            return torch.zeros_like(total_MN)
        return orthogonal_product(parts, values_R.mean().expand_as(values_R), tolerance)

    return by_matrix(deltas_KN, weight, spectral, combine).mul_(lambda_)


def directions_per_task(rank: int, count: int, common_space_fraction: float) -> int:
    """How many of ``rank`` directions each of ``count`` tasks gets: what the common ones leave, rounded as the authors
    do (halves to even) but never more than there are."""
    left = rank - int(rank * common_space_fraction + 1e-9)  # 0.7 * 10 is a little less than 7
    return min(round(left / count), rank // count)


def _own(matrix_MN: Tensor, common_MR: Tensor, count: int, tolerance: float):
    """The first triplets of what a task has outside the common left space (the right one is not projected out)."""
    rest_MN = torch.addmm(matrix_MN, common_MR, common_MR.T @ matrix_MN, alpha=-1)
    # Relative to the task as a whole: what the projection leaves of a task inside the common space is rounding.
    return triplets(rest_MN, tolerance, relative_to=float(matrix_MN.norm(dtype=torch.float64))).first(count)
