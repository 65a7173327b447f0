"""TSV-Merge: the strongest singular directions of each task, made orthogonal to each other before they are added."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.merge.methods._spectral import (
    RANK_TOLERANCE,
    VOCABULARY,
    by_matrix,
    distinct,
    except_for,
    orthogonal_product,
    triplets,
)
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2412.00081"
DEFAULTS = {"spectral": except_for("text_projection", *VOCABULARY)}


def unit(spectral: bool) -> str:
    return "tensor" if spectral else "element"


def tsv_m(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
    spectral: bool = True,
    tolerance: Annotated[float, Between(0, 1)] = RANK_TOLERANCE,
) -> Tensor:
    """``theta_0 + lambda * polar(U) S polar(V)``, U S V the first r // K singular triplets of each task vector.

    Args:
        deltas_KN: task vectors, ``[K, *shape]``. What is not a matrix is averaged, as in the paper, and so are matrices
            with fewer than K rows or columns, in which the tasks have no room beside each other.
        weight: factor of each task vector; all 1 in the paper.
        lambda_: scale of the merged task vector; the paper searches 0.1 to 3 on validation data, 1 without
            (unverified).
        spectral: treat this matrix by its singular vectors, or average it. By default all but embeddings, language
            model heads and CLIP's text_projection.
        tolerance: singular values up to this share of the largest are no part of a task (the authors' code keeps them:
            their arbitrary directions displace those of low-rank task vectors), and directions that tasks share up to
            this share are one. Raise it to 1e-2 or so for LoRA models that were merged and rounded to bfloat16.

    Task vectors that repeat each other count once: their common directions can't be made orthogonal.
    """

    def combine(matrices: list[Tensor]) -> Tensor | None:
        matrices = distinct(matrices)
        if len(matrices) == 1:
            return matrices[0].clone()
        room = min(matrices[0].shape) // len(matrices)
        if not room:
            return None
        parts = [triplets(matrix_MN, tolerance).first(room) for matrix_MN in matrices]
        return orthogonal_product(parts, torch.cat([part.values_R for part in parts]), tolerance)

    return by_matrix(deltas_KN, weight, spectral, combine).mul_(lambda_)
