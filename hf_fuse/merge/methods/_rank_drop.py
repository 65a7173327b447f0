"""DELLA's step: drop elements at random, the smaller the likelier, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods._random import STEPS, TensorRandom


def ascending_order(delta_RC: Tensor) -> Tensor:
    """For each row the columns from the smallest |delta| to the largest; equal ones as they stand. ``int64 [R, C]``."""
    if delta_RC.dtype != torch.float32 or not delta_RC.is_cpu:
        return delta_RC.abs().argsort(dim=-1, stable=True)
    # Magnitude bits above, column below, in one integer: sorting whole numbers is a fifth of the work of an argsort.
    keys_RC = delta_RC.abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys_RC.bitwise_or_(torch.arange(delta_RC.shape[-1]))
    np.ndarray.sort(keys_RC.numpy(), axis=-1)
    return keys_RC.bitwise_and_(0xFFFFFFFF)


def check_probabilities(density: Sequence[float], epsilon: Sequence[float]) -> None:
    """Raises RecipeError if an element would have to be kept with a probability that is not between 0 and 1."""
    for mean, spread in zip(density, epsilon):
        if 0 < mean < 1 and not (mean - spread > 0 and mean + spread < 1):
            raise RecipeError(
                f"parameters: density {mean:g} and epsilon {spread:g} give keep probabilities from {mean - spread:g} "
                f"to {mean + spread:g}; they must lie between 0 and 1. Make epsilon smaller."
            )


def keep_steps(columns: int, density: float, epsilon: float) -> np.ndarray:
    """Keep probabilities by rank, in units of 1/65536: ``density - epsilon`` for the smallest element of a row,
    ``density + epsilon`` for the largest, evenly in between. ``uint16 [C]``"""
    # A row of one element has no rank to tell, and its mean probability is the density.
    low, high = (density - epsilon, density + epsilon) if columns > 1 else (density, density)
    return np.linspace(low * STEPS, high * STEPS, columns).round().clip(1, STEPS - 1).astype(np.uint16)


def drop(
    model: int, delta_RC: Tensor, density: float, epsilon: float, random: TensorRandom, *, divide: bool = False
) -> Tensor:
    """``mask * tau``, divided by the keep probability of each element with ``divide``. ``[R, C]``"""
    if density >= 1:
        return delta_RC.clone()
    if density <= 0:
        return torch.zeros_like(delta_RC)
    steps_C = keep_steps(delta_RC.shape[-1], density, epsilon)
    # A row's random numbers go to its elements by rank, so that only what comes of them has to be put in place.
    kept_RC = random.bits(model, delta_RC.numel()).reshape(delta_RC.shape) < steps_C
    factor_C = STEPS / steps_C.astype(np.float64) if divide else np.ones(len(steps_C))
    kind = np.float64 if delta_RC.dtype == torch.float64 else np.float32
    factor_RC = torch.from_numpy(kept_RC * factor_C.astype(kind)).to(delta_RC.device)
    return torch.empty_like(delta_RC).scatter_(-1, ascending_order(delta_RC), factor_RC).mul_(delta_RC)


def drop_by_rank(
    deltas_KRC: Tensor,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    random: TensorRandom,
    *,
    rescale: str,
    factors: Sequence[float] | None,
) -> list[Tensor]:
    """K matrices ``w_k * mask_k * tau_k / p_k`` with ``rescale: probability``; else a factor for all takes the place of
    1/p: the given L1 factors, those of the block itself if there are none, or 1."""
    rows = []
    for k, delta_RC in enumerate(deltas_KRC):
        kept_RC = drop(k, delta_RC, density[k], epsilon[k], random, divide=rescale == "probability")
        factor = weight[k]
        if rescale == "l1_norm" and factors is not None:
            factor *= factors[k]
        elif rescale == "l1_norm":
            after = kept_RC.abs().sum().item()
            factor *= delta_RC.abs().sum().item() / after if after > 0 else 1.0
        rows.append(kept_RC if factor == 1 else kept_RC.mul_(factor))
    return rows
