"""DELLA: drop elements at random, small ones more often, elect a sign per parameter, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._drop import l1_factors
from hf_fuse.merge.methods._election import POSITIVE, combine_agreeing
from hf_fuse.merge.methods._passes import Measurement, Seen
from hf_fuse.merge.methods._random import TensorRandom
from hf_fuse.merge.methods._rank_drop import check_probabilities, drop, drop_by_rank
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2406.11617"
SCALARS = "mean"
MEASURE_SCOPE = "tensor"
PASSES = 1  # 2 with rescale: l1_norm


def check(density: Sequence[float], epsilon: Sequence[float]) -> None:
    check_probabilities(density, epsilon)


def unit(ranks: str) -> str:
    return "tensor" if ranks == "tensor" else "rows"


def measure(
    count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float], epsilon: Sequence[float], rescale: str
) -> Measurement:
    def dropped(k: int, delta_RC: Tensor, seen: Seen) -> Tensor:
        return drop(k, delta_RC, density[k], epsilon[k], seen.random)

    return (yield from l1_factors(count, dropped)) if rescale == "l1_norm" else None


def della(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.7,
    epsilon: Annotated[PerModel, Between(0, 0.5)] = 0.07,
    lambda_: float = 1.1,
    normalize: bool = True,
    rescale: Literal["probability", "l1_norm", "none"] = "probability",
    ranks: Literal["row", "tensor"] = "row",
    state: Sequence[float] | None,
    random: TensorRandom,
) -> Tensor:
    """``theta_0 + lambda * mean of the dropped and rescaled task vectors that have the elected sign``.

    Args:
        deltas_KN: task vectors, ``[K, R, C]``: R rows of C elements; a vector is one row.
        weight: factor of each task vector, before the vote.
        density: mean probability of keeping an element (1 - the authors' drop rate of 0.3). 1 keeps all, 0 none.
        epsilon: half the spread of the probabilities: the smallest element of a row is kept with ``density - epsilon``,
            the largest with ``density + epsilon`` (the authors' window is twice that, 0.14).
        lambda_: scale of the merged task vector; 1.1 in the authors' README.
        normalize: divide by the weights of the agreeing models (mean); off: their sum.
        rescale: ``probability`` divides each element by its own probability (the paper; unbiased); ``l1_norm`` restores
            each tensor's L1 norm (mergekit); ``none``.
        ranks: compare elements within their row of the matrix, or within the tensor, which is then held whole.
        state: factors for ``l1_norm``.
        random: keyed by seed, tensor, model, row and rank in it.

    Equal magnitudes rank by position. Votes that cancel exactly count as positive.
    """
    values = drop_by_rank(
        deltas_KN.flatten(1)[:, None] if ranks == "tensor" else deltas_KN,
        weight, density, epsilon, random, rescale=rescale, factors=state,
    )  # fmt: skip
    return combine_agreeing(values, weight, tied=POSITIVE, normalize=normalize).mul_(lambda_)
