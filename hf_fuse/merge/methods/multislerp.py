"""Multi-SLERP: the weighted mean of the models' directions, each tensor one vector, at their mean length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._products import gram
from hf_fuse.merge.methods._sphere import combine, norms_and_cosines, shares
from hf_fuse.registry import PerModel

PAPER = None  # a community method
SCALARS = "mean"
MEASURE_SCOPE = "tensor"
_EPSILON = 1e-7  # relative length at which directions count as balancing out: what fp32 can tell


def check(weight: Sequence[float], normalize: bool) -> None:
    if normalize:
        shares(weight, "multislerp")


def measure(count: int, numel: int, dtype: torch.dtype) -> Measurement:
    return (yield from gram(count))


def multislerp(vectors_KN: Tensor, *, weight: PerModel = 1.0, normalize: bool = True, state: Tensor) -> Tensor:
    """``(sum_k w_k |v_k|) * normalised(sum_k w_k v_k / |v_k|)``.

    Args:
        vectors_KN: K models, or their task vectors if the recipe has a base; N elements.
        weight: one number per model.
        normalize: divide the weights by their sum.
        state: K x K inner products of the whole tensor.

    The original goes through the tangent space at the mean direction; what it finds there is zero, so this closed form
    is all of it. A zero vector has a length but no direction. Two vectors that balance out are averaged linearly.

    Raises:
        RecipeError: the directions of three or more models balance out.
    """
    if normalize:
        weight = shares(weight, "multislerp")
    norms, cosines = norms_and_cosines(state)
    share = torch.tensor(weight, dtype=torch.float64) * (norms > 0)
    length = float(share @ cosines @ share)
    if length <= (_EPSILON * float(share.abs().sum())) ** 2:
        if len(weight) > 2 and norms.max() > 0:
            raise RecipeError(
                "multislerp: the models' directions balance out in a tensor, so they have no mean. Use other weights, "
                "or another method for it."
            )
        return combine(vectors_KN, weight)
    factors = share / norms.masked_fill(norms == 0, 1.0) * (float(share @ norms) / length**0.5)
    return combine(vectors_KN, factors.tolist())
