"""Fisher merging: each weight averaged by how much each model's predictions depend on it."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods._passes import Measurement, Pass
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2111.09832"
STATISTICS = "fisher"


def check(weight: list[float]) -> None:
    if min(weight) < 0 or not sum(weight):
        raise RecipeError("fisher: weights must be at least 0, and one above 0.")


def measure(models: int, numel: int, dtype: torch.dtype, normalize: bool) -> Measurement:
    """The root mean square of each model's Fisher over the whole model, ``fp64 [K]``; None without ``normalize``."""
    if not normalize:
        return None
    squares_K = torch.zeros(models, dtype=torch.float64)
    total_K = yield Pass(squares_K, lambda fisher_KN, total, _: total.add_(_squares(fisher_KN)), of="statistics")
    return (total_K / numel).sqrt()


def _squares(fisher_KN: Tensor) -> Tensor:
    return fisher_KN.double().square().sum(1).cpu()


def fisher(
    models_KN: Tensor,
    *,
    statistics: Tensor,
    state: Tensor | None,
    weight: PerModel = 1.0,
    normalize: bool = True,
    floor: Annotated[float, Between(0)] = 1e-6,
) -> Tensor:
    """``sum_k w_k F_k theta_k / sum_k w_k F_k``, F_k the diagonal of model k's Fisher information.

    Args:
        models_KN: weights of K models.
        statistics: their F, ``[K, N]``.
        state: each F's root mean square over the whole model.
        weight: importance of each model, at least 0.
        normalize: divide each F by that, so that no model dominates by the size of its gradients alone. The authors
            divide by its length, which makes the same averages.
        floor: F below this, after ``normalize``, counts as this: weights on which no model depends become the mean.
            The authors have it before: a model that is sure of all its examples has an F far below the floor, which
            then outweighs the F of all others nearly everywhere.

    The authors keep the head of one model; a filter on ``weight`` does that here.
    It is for fine-tunes of one well-trained base: models that grew far apart come out worse than their mean.
    """
    weight_K1 = models_KN.new_tensor(weight)[:, None]
    if state is not None:
        statistics = statistics / torch.where(state > 0, state, 1.0).to(statistics)[:, None]
    share_KN = statistics.clamp(min=floor) * weight_K1
    total_N = share_KN.sum(0)
    # Without a floor there may be nothing to weigh by.
    share_KN = torch.where(total_N > 0, share_KN, weight_K1)
    return (share_KN * models_KN).sum(0) / share_KN.sum(0)
