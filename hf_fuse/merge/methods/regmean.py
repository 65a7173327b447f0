"""RegMean: the matrix that comes closest to every model's outputs on that model's own inputs, in closed form."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2212.09849"
STATISTICS = "gram"


def check(weight: list[float]) -> None:
    if min(weight) < 0 or not sum(weight):
        raise RecipeError("regmean: weights must be at least 0, and one above 0.")


def unit(input_axis: int | None) -> str:
    return "element" if input_axis is None else "tensor"


def regmean(
    models_KN: Tensor,
    *,
    statistics: Tensor | None,
    input_axis: int | None,
    weight: PerModel = 1.0,
    alpha: Annotated[float, Between(0, 1)] = 0.9,
    ridge: Annotated[float, Between(0)] = 1e-6,
) -> Tensor:
    """``W' = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k'``, G_k the mean of x x' over the inputs of model k's layer.

    Minimises ``sum_k w_k E |W x - W_k x|^2``. What has no G (biases, norms, embeddings) is averaged.

    Args:
        models_KN: weights of K models; matrices with G as ``[K, *shape]``.
        statistics: their G, ``[K, in, in]``, or None.
        input_axis: of the matrix, 1 for ``[out, in]``; None without G.
        weight: importance of each model, at least 0. A larger G makes a model more important too.
        alpha: factor of what lies off G's diagonal. 0.9 is the paper's for most models, 0.1 for T5 (unverified).
        ridge: pulls towards the mean with this share of the mean of G's diagonal, so that inputs that are always zero
            get the mean. The paper has none: with fewer inputs than columns nothing can be solved then.
    """
    share_K = [w / sum(weight) for w in weight]
    mean = sum(matrix.double() * share for share, matrix in zip(share_K, models_KN))
    if input_axis is None:
        return mean.to(models_KN)
    by_input = (lambda matrix: matrix) if input_axis == 0 else (lambda matrix: matrix.T)
    left_II = torch.zeros_like(statistics[0], dtype=torch.float64)
    right_IO = torch.zeros_like(by_input(mean))
    for share, gram_II, matrix in zip(share_K, statistics, models_KN):
        scaled_II = alpha * gram_II.double()
        scaled_II.diagonal().copy_(gram_II.diagonal())
        left_II.add_(scaled_II * share)
        right_IO.add_(scaled_II @ by_input(matrix.double()) * share)
    pull = ridge * left_II.diagonal().mean()
    left_II.diagonal().add_(pull)
    right_IO.add_(by_input(mean) * pull)
    if not left_II.any():
        return mean.to(models_KN)
    factor_II, failed = torch.linalg.cholesky_ex(left_II)
    if failed and left_II.isfinite().all():
        raise FuseError("regmean: inputs that are zero or repeat each other leave nothing to solve. Raise ridge.")
    return by_input(torch.cholesky_solve(right_IO, factor_II)).to(models_KN).contiguous()
