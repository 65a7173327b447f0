"""DARE with the sign election of TIES: drop at random, rescale, add up what agrees with the elected sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from hf_fuse.merge.methods._drop import drop_and_rescale
from hf_fuse.merge.methods._election import POSITIVE, combine_agreeing
from hf_fuse.merge.methods._random import TensorRandom
from hf_fuse.merge.methods.dare_linear import measure
from hf_fuse.registry import Between, PerModel

__all__ = ["dare_ties", "measure"]

PAPER = "https://arxiv.org/abs/2311.03099"
SCALARS = "mean"
MEASURE_SCOPE = "tensor"


def dare_ties(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.8,
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: Literal["expectation", "l1_norm", "none"] = "expectation",
    state: Sequence[float] | None,
    random: TensorRandom,
) -> Tensor:
    """``theta_0 + lambda * sum of dropped and rescaled task vectors that have the elected sign``.

    Args:
        deltas_KN: task vectors, N elements.
        weight: factor of each task vector, before the vote.
        density: probability of keeping an element (1 - the paper's drop rate).
        lambda_: common scale.
        normalize: divide by the weights of the agreeing models (mean); off: their sum.
        rescale: as in dare_linear.
        state: factors for ``rescale: l1_norm``.
        random: keyed by seed, tensor, model and position.

    Votes that cancel exactly count as positive (a rule of ours; the papers leave it open after random dropping).
    """
    values = drop_and_rescale(deltas_KN, weight, density, random, rescale=rescale, factors=state)
    return combine_agreeing(values, weight, tied=POSITIVE, normalize=normalize).mul_(lambda_)
