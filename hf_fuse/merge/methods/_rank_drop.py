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


def keep_steps(delta_RC: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep probabilities in units of 1/65536: ``density - epsilon`` for a row's smallest element, ``density + epsilon``
    for its largest, evenly by rank in between. ``[R, C]``"""
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise RecipeError(
            f"parameters: density {density:g} and epsilon {epsilon:g} give keep probabilities from "
            f"{density - epsilon:g} to {density + epsilon:g}; they must lie between 0 and 1. Make epsilon smaller."
        )
    columns = delta_RC.shape[-1]
    # A row of one element has no rank to tell, and its mean probability is the density.
    low, high = (density - epsilon, density + epsilon) if columns > 1 else (density, density)
    ramp = torch.linspace(low * STEPS, high * STEPS, columns, dtype=torch.float64).round_().clamp_(1, STEPS - 1)
    ramp_RC = ramp.to(delta_RC.device, delta_RC.dtype).expand_as(delta_RC)
    return torch.empty_like(delta_RC).scatter_(-1, ascending_order(delta_RC), ramp_RC)


def drop(
    model: int, delta_RC: Tensor, density: float, epsilon: float, random: TensorRandom, *, divide: bool = False
) -> Tensor:
    """``mask * tau``, divided by the keep probability of each element with ``divide``. ``[R, C]``"""
    if density >= 1:
        return delta_RC.clone()
    if density <= 0:
        return torch.zeros_like(delta_RC)
    steps_RC = keep_steps(delta_RC, density, epsilon)
    drawn = torch.from_numpy(random.bits(model, delta_RC.numel()).astype(np.float32))
    drawn_RC = drawn.to(steps_RC.device, steps_RC.dtype).view_as(steps_RC)
    # Whole numbers: steps - drawn is at least 1 where the element is kept, and 0 or less where it is dropped.
    mask_RC = drawn_RC.neg_().add_(steps_RC).clamp_(0, 1)
    if divide:
        mask_RC.mul_(STEPS).div_(steps_RC)
    return mask_RC.mul_(delta_RC)


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
