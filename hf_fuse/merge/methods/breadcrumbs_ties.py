"""Model Breadcrumbs with the sign election of TIES: drop both tails, add up what agrees with the elected sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from hf_fuse.merge.methods._election import POSITIVE, combine_agreeing
from hf_fuse.merge.methods._trim import trimmed
from hf_fuse.merge.methods.breadcrumbs import measure
from hf_fuse.registry import Between, PerModel

__all__ = ["breadcrumbs_ties", "measure"]

PAPER = "https://arxiv.org/abs/2312.06795"
SCALARS = "mean"
PASSES = 3


def breadcrumbs_ties(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.2,
    gamma: Annotated[PerModel, Between(0, 1)] = 0.1,
    lambda_: float = 1.0,
    normalize: bool = False,
    precedence: Literal["gamma", "density"] = "gamma",
    scope: Literal["tensor", "model"] = "tensor",
    state: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """``theta_0 + lambda * sum of the trimmed task vectors that have the elected sign``.

    Args:
        deltas_KN: task vectors, N elements.
        weight: factor of each task vector, before the vote.
        density: share to keep, after the outliers are gone, as in breadcrumbs.
        gamma: share of the largest elements to drop.
        lambda_: common scale.
        normalize: divide by the weights of the agreeing models (mean); off: their sum.
        precedence: what holds where gamma and density add up to more than everything.
        scope: thresholds of each tensor, or of the whole model.
        state: lowest and highest magnitude to keep.

    A combination found in mergekit, not in either paper. Votes that cancel exactly count as positive.
    """
    lowest, highest = state
    values = trimmed(deltas_KN, lowest, weight, highest)
    return combine_agreeing(values, weight, tied=POSITIVE, normalize=normalize).mul_(lambda_)
