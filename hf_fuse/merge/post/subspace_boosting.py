"""Subspace Boosting: lift the weak singular values of a merged task vector, so that no direction is lost."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods._spectral import RANK_TOLERANCE, VOCABULARY, except_for, triplets
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2506.16506"
DEFAULTS = {"spectral": except_for("text_projection", *VOCABULARY)}


def applies(shape: tuple[int, ...], spectral: bool, beta: float) -> bool:
    return len(shape) == 2 and min(shape) > 1 and spectral and beta < 1


def subspace_boosting(
    delta_MN: Tensor,
    *,
    beta: Annotated[float, Between(0, 1)] = 0.2,
    parts: Annotated[int, Between(1)] = 1,
    spectral: bool = True,
    tolerance: Annotated[float, Between(0, 1)] = RANK_TOLERANCE,
) -> Tensor:
    """``U max(S, S_j) V`` with j the first of the largest singular values that make up ``beta`` of their sum.

    Args:
        delta_MN: merged task vector of one matrix.
        beta: small lifts much (up to the largest singular value, if that alone makes up beta), 1 lifts nothing. 0.2 in
            the study arXiv 2511.21437, stable from 0.1 to 0.5; the authors' own default is unverified.
        parts: boost this many stacked matrices one by one: 3 for a fused projection to query, key and value.
        spectral: boost this matrix, or leave it. By default all but embeddings, language model heads and CLIP's
            text_projection; the study boosts the projections of attention and MLP only.
        tolerance: singular values up to this share of the largest stay as they are, so that a low-rank change is not
            filled up with arbitrary directions.

    Boosting lengthens the task vector (by how much depends on its spectrum), so lambda has to be chosen anew.
    """
    if delta_MN.shape[0] % parts:
        raise RecipeError(
            f"post.subspace_boosting: parts is {parts}, but a matrix has {delta_MN.shape[0]} rows, which are not "
            f"{parts} stacked matrices of equal height. Say by a filter which tensors have parts."
        )
    return torch.cat([_boosted(part_MN, beta, tolerance) for part_MN in delta_MN.chunk(parts)])


def _boosted(delta_MN: Tensor, beta: float, tolerance: float) -> Tensor:
    if not delta_MN.sum().isfinite():  # allowed by --allow-nonfinite, and has no SVD
        return delta_MN
    found = triplets(delta_MN, tolerance)
    values = found.values_R
    if not len(values):
        return delta_MN
    share = values.double().cumsum(0) / values.double().sum()
    reached = (share >= beta).nonzero()
    if not len(reached):  # rounding, next to beta 1
        return delta_MN
    # Adding what is missing leaves the rest of the matrix, small singular values included, bit for bit as it was.
    missing = (values[int(reached[0])] - values).clamp_min_(0.0)
    return delta_MN + found.product(missing) if bool(missing.any()) else delta_MN
