"""DARE: drop most of each task vector at random, rescale the rest, add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._drop import drop, drop_and_rescale, l1_factors
from hf_fuse.merge.methods._election import add_up
from hf_fuse.merge.methods._passes import Measurement, Seen
from hf_fuse.merge.methods._random import TensorRandom
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2311.03099"
SCALARS = "mean"
MEASURE_SCOPE = "tensor"


def measure(count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float], rescale: str) -> Measurement:
    def dropped(k: int, delta_N: Tensor, seen: Seen) -> Tensor:
        return drop(k, delta_N, density[k], seen.random)[0]

    return (yield from l1_factors(count, dropped)) if rescale == "l1_norm" else None


def dare_linear(
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
    """``theta_0 + lambda * sum_k w_k mask_k tau_k / density_k``.

    Args:
        deltas_KN: task vectors, N elements.
        weight: one number per model.
        density: probability of keeping an element (1 - the paper's drop rate p; p = 0.2 in the authors' LLM merges).
        lambda_: common scale.
        normalize: divide by the sum of the weights.
        rescale: ``expectation`` divides by the density (the paper); ``l1_norm`` restores each tensor's L1 norm
            (mergekit; biased on small tensors); ``none``.
        state: factors for ``l1_norm``.
        random: keyed by seed, tensor, model and position: chunks and ranks do not matter.
    """
    values = drop_and_rescale(deltas_KN, weight, density, random, rescale=rescale, factors=state)
    return add_up(values, weight, normalize=normalize).mul_(lambda_)
