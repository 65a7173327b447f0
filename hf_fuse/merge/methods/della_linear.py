"""DELLA without its vote: drop elements at random, small ones more often, rescale the rest and add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from hf_fuse.merge.methods._election import add_up
from hf_fuse.merge.methods._random import TensorRandom
from hf_fuse.merge.methods._rank_drop import drop_by_rank
from hf_fuse.merge.methods.della import check, measure, unit
from hf_fuse.registry import Between, PerModel

__all__ = ["check", "della_linear", "measure", "unit"]

PAPER = "https://arxiv.org/abs/2406.11617"
SCALARS = "mean"
MEASURE_SCOPE = "tensor"
PASSES = 1  # 2 with rescale: l1_norm


def della_linear(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.7,
    epsilon: Annotated[PerModel, Between(0, 0.5)] = 0.07,
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: Literal["probability", "l1_norm", "none"] = "probability",
    ranks: Literal["row", "tensor"] = "row",
    state: Sequence[float] | None,
    random: TensorRandom,
) -> Tensor:
    """``theta_0 + lambda * sum_k w_k mask_k tau_k / p_k``.

    Args:
        deltas_KN: task vectors, ``[K, R, C]``: R rows of C elements; a vector is one row.
        weight: one number per model.
        density: mean probability of keeping an element.
        epsilon: half the spread of the probabilities between a row's smallest and largest element.
        lambda_: common scale.
        normalize: divide by the sum of the weights.
        rescale: as in della.
        ranks: compare elements within their row of the matrix, or within the tensor.
        state: factors for ``l1_norm``.
        random: keyed by seed, tensor, model, row and rank in it.
    """
    values = drop_by_rank(
        deltas_KN.flatten(1)[:, None] if ranks == "tensor" else deltas_KN,
        weight, density, epsilon, random, rescale=rescale, factors=state,
    )  # fmt: skip
    return add_up(values, weight, normalize=normalize).mul_(lambda_)
