"""RAM's step: tell elements that several models changed from those that one alone did."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import hardshrink

from hf_fuse.merge.methods._election import total_of


def active(deltas_KN: Tensor, epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Task vectors without what is not larger than ``epsilon``, 0/1 rows of what is left, and their sum ``[N]``."""
    values = [hardshrink(delta_N, epsilon) for delta_N in deltas_KN]
    masks = [value_N.sign().abs_() for value_N in values]
    return values, masks, total_of(masks)


def combine_by_overlap(deltas_KN: Tensor, epsilon: float, boost: Sequence[float] | None = None) -> Tensor:
    """Mean over the models that changed an element; the change itself, times the model's ``boost``, where it is the
    only one. ``[N]``"""
    values, masks, count_N = active(deltas_KN, epsilon)
    merged_N = total_of(values).div_(count_N.clamp_min(1.0))
    if boost is None or all(factor == 1 for factor in boost):
        return merged_N
    alone_N = count_N.neg_().add_(2.0).clamp_(0.0, 1.0)  # 0 from two on
    factor_N = total_of([mask_N.mul_(factor - 1) for mask_N, factor in zip(masks, boost)])
    return merged_N.mul_(factor_N.mul_(alone_N).add_(1.0))
