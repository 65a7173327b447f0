"""TIES-Merging: trim small changes, elect a sign per parameter, average only what agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._election import NEGATIVE, POSITIVE, combine_agreeing, sign_balance
from hf_fuse.merge.methods._passes import Measurement, Pass, Seen
from hf_fuse.merge.methods._threshold import count_from, guess_kth_largest_magnitude, kth_largest_magnitude
from hf_fuse.merge.methods._trim import trimmed
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2306.01708"
SCALARS = "mean"
PASSES = 4  # at most: thresholds from samples and a full pass, the vote, the merge; less where the samples suffice


def measure(
    count: int,
    numel: int,
    dtype: torch.dtype,
    *,
    density: Sequence[float],
    trim: str,
    tie: str,
) -> Measurement:
    """State: the K trim thresholds, and the sign of elements whose votes cancel."""
    # The authors' code keeps one element more than the density says; `exact` keeps the number, at least one.
    ranks = [int(numel * d) + 1 if trim == "paper" else max(1, int(numel * d)) for d in density]
    ranks = [numel + 1 if d >= 1 else rank for d, rank in zip(density, ranks)]
    guess = yield from guess_kth_largest_magnitude(ranks, numel, dtype)
    if guess is not None:  # check it, and hold the vote by it, in one pass
        counts = yield _vote(_with_nothing(guess, density), check=True)
        if all(rank > numel or above < rank <= above + equal for rank, (above, equal) in zip(ranks, counts[:-1])):
            return _with_nothing(guess, density), _majority(counts, tie)
    thresholds = _with_nothing((yield from kth_largest_magnitude(ranks, numel, dtype)), density)
    if tie == "positive":
        return thresholds, POSITIVE
    return thresholds, _majority((yield _vote(thresholds)), tie)


def _with_nothing(thresholds: Sequence[float], density: Sequence[float]) -> list[float]:
    """Density 0 keeps nothing, whatever the threshold."""
    return [threshold if d > 0 else math.inf for d, threshold in zip(density, thresholds)]


def _vote(thresholds: Sequence[float], *, check: bool = False) -> Pass:
    """Balance of signs after trimming, in the last row; with ``check`` above it how many elements of each model are
    larger than its threshold, and how many equal it."""
    count = len(thresholds)

    def add(block_KN: Tensor, total: Tensor, seen: Seen) -> None:
        for k in range(count if check else 0):
            above, equal = count_from(block_KN[k].abs(), thresholds[k])
            total[k] += torch.tensor([above, equal])
        total[count, 0] += sign_balance(trimmed(block_KN, thresholds, seen.options["weight"])).cpu()

    return Pass(torch.zeros(count + 1, 2, dtype=torch.int64), add)


def _majority(counts: Tensor, tie: str) -> float:
    return POSITIVE if tie == "positive" or counts[-1, 0] > 0 else NEGATIVE


def ties(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.2,
    lambda_: float = 1.0,
    normalize: bool = True,
    scope: Literal["model", "tensor"] = "model",
    trim: Literal["paper", "exact"] = "paper",
    tie: Literal["majority", "positive"] = "majority",
    state: tuple[Sequence[float], float],
) -> Tensor:
    """``theta_0 + lambda * disjoint mean of trimmed task vectors``.

    Args:
        deltas_KN: task vectors, N elements.
        weight: factor of each model's task vector, before the vote; all 1 in the paper.
        density: share of each task vector to keep, by magnitude.
        lambda_: scale of the merged task vector; the paper searches 0.8 to 2.5, 1 without validation data (unverified).
        normalize: divide by the weights of the agreeing models (mean); off: their sum.
        scope: trim over the whole model, as the authors do, or within each tensor.
        trim: ``paper`` keeps int(density * n) + 1 elements as the authors' code, ``exact`` int(density * n); elements
            equal to the threshold are all kept either way.
        tie: sign where the votes cancel exactly: that of the majority of the model (the authors), or positive.
        state: thresholds and the sign for ties.
    """
    thresholds, tied = state
    values = trimmed(deltas_KN, thresholds, weight)
    return combine_agreeing(values, weight, tied=tied, normalize=normalize).mul_(lambda_)
