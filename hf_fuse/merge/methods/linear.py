"""Weighted average of models: the (uniform or weighted) model soup."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_fuse.errors import RecipeError
from hf_fuse.registry import PerModel

PAPER = "https://arxiv.org/abs/2203.05482"


def check(weight: Sequence[float], normalize: bool) -> None:
    if normalize and sum(weight) == 0:
        raise RecipeError("linear: the weights sum to 0, so they can't be normalised. Change one, or normalize: false.")


def linear(models_KN: Tensor, *, weight: PerModel = 1.0, normalize: bool = True) -> Tensor:
    """``sum_k w_k theta_k``, divided by ``sum_k w_k`` with ``normalize``.

    Args:
        models_KN: weights of K models, N elements.
        weight: one number per model.
        normalize: divide by the sum of the weights, which must not be 0 then.
    """
    if normalize:
        total = sum(weight)
        weight = [w / total for w in weight]
    merged_N = models_KN[0] * weight[0]
    for k in range(1, len(weight)):
        merged_N.add_(models_KN[k], alpha=weight[k])
    return merged_N
