"""The last step of most methods: add the models' changes up, or elect a sign per element and combine what agrees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

POSITIVE, NEGATIVE = 1.0, -1.0


def total_of(values: Iterable[Tensor]) -> Tensor:
    """Sum of K rows ``[N]``. Row by row: a row stays in the cache, a block of K rows does not."""
    first, second, *rest = [*values, None]
    if second is None:
        return first.clone()
    total_N = first + second
    for value_N in rest[:-1]:
        total_N.add_(value_N)
    return total_N


def add_up(values: Iterable[Tensor], weight: Sequence[float], *, normalize: bool) -> Tensor:
    """Sum over models of K rows ``[N]`` that are already multiplied by their weights; with ``normalize`` divided by the
    sum of the weights, if that is not 0."""
    total_N = total_of(values)
    return total_N.div_(sum(weight) or 1.0) if normalize else total_N


def sign_balance(values: Iterable[Tensor]) -> Tensor:
    """Number of elements whose sum over models is positive minus that of negative ones: ``int64 []``.

    Args:
        values: K rows ``[N]``, N < 2**24 so that the sum of signs is exact.
    """
    return total_of(values).sign_().sum().to(torch.int64)


def elected_sign(values: Iterable[Tensor], tied: float) -> Tensor:
    """Sign of the sum over models, +1 or -1; ``tied`` where it is zero. ``[N]``"""
    return total_of(values).sign_().add_(0.5 * tied).sign_()


def combine_agreeing(
    values: Sequence[Tensor], weight: Sequence[float], *, tied: float, normalize: bool, sign_N: Tensor | None = None
) -> Tensor:
    """Sum over models of the values that have the elected sign, ``[N]``.

    Args:
        values: K rows ``[N]`` of differences, already multiplied by their weights.
        weight: K weights; with ``normalize`` the sum is divided by the weights of the models that agree and are not
            zero there (1 each: the disjoint mean of the TIES paper).
        tied: sign of elements whose values cancel exactly, +1 or -1.
        sign_N: the elected signs, if it is not the values that voted.
    """
    sign_N = elected_sign(values, tied) if sign_N is None else sign_N
    merged_N, share_N = torch.zeros_like(sign_N), torch.zeros_like(sign_N)
    for value_N, one in zip(values, weight):
        agreeing_N = (value_N * sign_N).clamp_min_(0.0)
        merged_N.add_(agreeing_N)
        if normalize:
            share_N.add_(agreeing_N.sign_(), alpha=one)
    merged_N.mul_(sign_N)
    if not normalize:
        return merged_N
    if min(weight) >= 0:  # the weights add up to nothing only where the values do too
        return merged_N.div_(share_N.clamp_min_(torch.finfo(share_N.dtype).tiny))
    return torch.where(share_N == 0, merged_N, merged_N / share_N)
