"""PCB-Merging: weigh each parameter by its rank within its task and its agreement with the others, drop the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from hf_fuse.merge.methods._passes import Measurement, Seen
from hf_fuse.merge.methods._threshold import kth_largest_magnitude, places_from
from hf_fuse.registry import Between, PerModel

PAPER = "https://arxiv.org/abs/2410.02396"
SCALARS = "mean"
PASSES = 6


@dataclass(frozen=True)
class Balance:
    """What PCB measures, per model: bounds of |tau|; least importance that counts, and the greatest there is."""

    low: list[float]
    high: list[float]
    least: list[float]
    most: list[float]


def measure(count: int, numel: int, dtype: torch.dtype, *, density: Sequence[float], clip: float) -> Measurement:
    rank = [numel - int(numel * clip), numel - max(int(numel * (1 - clip) - 1), 0)]
    bounds = yield from kth_largest_magnitude(rank * count, numel, dtype, rows=[k for k in range(count) for _ in rank])
    low, high = bounds[::2], bounds[1::2]

    def important(sign: float) -> Callable[[Tensor, Seen, Sequence[float]], list[Tensor]]:
        def rows(block_KN: Tensor, seen: Seen, least: Sequence[float]) -> Sequence[Tensor]:
            found = _importances(block_KN, low, high, least)
            return found.values.mul_(sign).clamp_min_(0.0).split(found.sizes)

        return rows

    # The importance is mostly positive. Only a large density reaches into the negative ones, which are ranked apart.
    below, most = [int(numel * (1 - d)) for d in density], []
    above = [numel - b for b in below]
    least = yield from kth_largest_magnitude(above, numel, dtype, values=important(1.0), largest=most)
    if min(least) <= 0:
        unsigned = yield from kth_largest_magnitude([b + 1 for b in below], numel, dtype, values=important(-1.0))
        least = [-u if one <= 0 else one for one, u in zip(least, unsigned)]
    return Balance(low, high, least, most)


def pcb(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Between(0, 1)] = 0.05,
    clip: Annotated[float, Between(0, 0.5)] = 0.01,
    lambda_: float = 1.2,
    scope: Literal["model", "tensor"] = "model",
    state: Balance,
) -> Tensor:
    """``theta_0 + lambda * sum_k w_k s_k tau_k / sum_k s_k`` with the scores s_k in [0, 1] of each parameter.

    With n = sgn(tau) N(|tau|), N clamping to quantiles and mapping to [0, 1], a parameter's importance to task k is
    ``exp(K n_k^2) * sum_j tanh(n_k n_j)``. Its score rises from 0 at the ``1 - density`` quantile of the importances to
    1 at the greatest.

    Args:
        deltas_KN: task vectors, N elements.
        weight: factor of each task vector.
        density: share of each task's parameters whose score is not zero (the authors' ratio: 0.05 for vision models,
            0.1 to 0.2 for language models).
        clip: |tau| is clamped to its ``clip`` and ``1 - clip`` quantiles.
        lambda_: scale; 1.2 in the authors' vision runs, 0.8 to 2.2 searched for T5.
        scope: quantiles of the whole model, as the authors do, or of each tensor.
        state: quantiles and ends of the scores.

    Of three variants in the authors' code this is the one of their evolutionary search, which does not depend on the
    unit of the weights. The softmaxes of the paper are unverified. A zero task vector takes no part.
    """
    found = _importances(deltas_KN, state.low, state.high, state.least)
    merged_N, share_N = torch.zeros_like(deltas_KN[0]), torch.zeros_like(deltas_KN[0])
    parts = zip(found.values.split(found.sizes), found.places.split(found.sizes))
    for k, (score_N, places) in enumerate(parts):
        low, high, least, most = state.low[k], state.high[k], state.least[k], state.most[k]
        if high <= 0:
            continue
        score_N = (
            score_N.sub(least).clamp_min_(0.0).div_(most - least)
            if most > least
            else score_N.ge(least).to(score_N.dtype)
        )
        delta_N = deltas_KN[k].index_select(0, places)
        value_N = delta_N.abs().clamp_(low, high).mul_(delta_N.sign_()).mul_(score_N).mul_(weight[k] * lambda_)
        merged_N.index_add_(0, places, value_N)
        share_N.index_add_(0, places, score_N)
    return merged_N.div_(share_N.clamp_min_(torch.finfo(share_N.dtype).tiny))


@dataclass(frozen=True)
class Importances:
    """Importances to all models, one after the other; how many there are for each, and whose they are."""

    values: Tensor
    sizes: list[int]
    places: Tensor


def _importances(deltas_KN: Tensor, low: Sequence[float], high: Sequence[float], least: Sequence[float]) -> Importances:
    """Elements that can't reach ``least`` are left out. Numbers do not depend on where in a block an element lies."""
    count, present = len(deltas_KN), sum(b > 0 for b in high)
    parts = [
        _reaching(delta_N, a, b, _least_magnitude(one, count, present))
        for delta_N, a, b, one in zip(deltas_KN, low, high, least)
    ]
    places, sizes = torch.cat(parts), [len(part) for part in parts]
    signed_KM = [_signed(delta_N.index_select(0, places), a, b) for delta_N, a, b in zip(deltas_KN, low, high)]
    own_M = torch.cat([signed_M.split(sizes)[k] for k, signed_M in enumerate(signed_KM)])
    agreement_M = torch.zeros_like(own_M)
    for signed_M in signed_KM:
        agreement_M.add_(_tanh(signed_M.mul_(own_M)))
    return Importances(own_M.square_().mul_(count).exp_().mul_(agreement_M), sizes, places)


def _signed(delta_N: Tensor, low: float, high: float) -> Tensor:
    """``sgn(tau) (clamp(|tau|, low, high) - low) / (high - low)``"""
    if high > low:
        return softshrink(delta_N, low).div_(high - low).clamp_(-1, 1)
    return delta_N.sign()  # all magnitudes alike, or all zero


@cache
def _least_magnitude(least: float, count: int, present: int) -> float:
    """An |n| below which the importance can't reach ``least``, whatever the other models say."""
    if not 0 < least < math.inf:
        return 0.0
    below, above = 0.0, 1.0
    for _ in range(20):
        middle = (below + above) / 2
        if math.exp(count * middle * middle) * present * math.tanh(middle) * 1.001 < least:
            below = middle
        else:
            above = middle
    return below


def _reaching(delta_N: Tensor, low: float, high: float, smallest: float) -> Tensor:
    """Indices where |n| may be at least ``smallest``."""
    if smallest <= 0:
        return torch.arange(delta_N.numel(), device=delta_N.device)
    if high <= 0:
        return torch.empty(0, dtype=torch.int64, device=delta_N.device)
    # A little less: n itself is rounded.
    return places_from(delta_N.abs(), low + 0.9999 * smallest * (high - low))


def _tanh(x: Tensor) -> Tensor:
    """tanh on [-1, 1], consumes ``x``. In fp32 by a rational function that is right to the last bits there."""
    if x.dtype != torch.float32:
        return x.tanh_()
    square = x * x
    above = (square + 105).mul_(square).add_(945).mul_(x)
    return above.div_(square.mul(15).add_(420).mul_(square).add_(945))
