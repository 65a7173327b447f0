"""Iso-C: the sum of the task vectors with all its singular values set to their mean."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.merge.methods._spectral import RANK_TOLERANCE, VOCABULARY, by_matrix, exact_total, except_for, triplets
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2502.04959"
DEFAULTS = {"spectral": except_for("text_projection", *VOCABULARY)}


def unit(spectral: bool) -> str:
    return "tensor" if spectral else "element"


def iso_c(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
    spectral: bool = True,
    tolerance: Annotated[float, Between(0, 1)] = RANK_TOLERANCE,
) -> Tensor:
    """``theta_0 + lambda * mean(S) U V`` with ``U S V`` the sum of the task vectors.

    Args:
        deltas_KN: task vectors, ``[K, *shape]``. What is not a matrix is averaged, as in the paper.
        weight: factor of each task vector; all 1 in the paper.
        lambda_: scale of the merged task vector; the paper searches 0.1 to 3 on validation data, 1 without
            (unverified).
        spectral: treat this matrix by its singular vectors, or average it. By default all but embeddings, language
            model heads and CLIP's text_projection.
        tolerance: singular values up to this share of the largest are left out, also of the mean (the authors' code
            raises them like all others, in arbitrary directions; most of the result of LoRA models would be noise).
    """

    def combine(matrices: list[Tensor]) -> Tensor:
        total_MN = exact_total(matrices)
        found = triplets(total_MN, tolerance)
        return found.product(found.values_R.mean().expand_as(found.values_R)) if len(found.values_R) else total_MN

    return by_matrix(deltas_KN, weight, spectral, combine).mul_(lambda_)
