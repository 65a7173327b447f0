"""TALL-masks: where a task vector outweighs the rest of the multi-task vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse.merge.methods._election import POSITIVE, combine_agreeing, total_of
from hf_fuse.merge.methods._trim import trimmed


def multitask_vector(
    deltas: Sequence[Tensor], weight: Sequence[float], lowest: Sequence[float] | None, election: bool
) -> Tensor:
    """Sum of the weighted task vectors, trimmed where ``lowest`` says so; with ``election`` (TIES) of those elements
    only that have the elected sign. ``[N]``"""
    values = trimmed(deltas, lowest or [0.0] * len(weight), weight)
    return combine_agreeing(values, weight, tied=POSITIVE, normalize=False) if election else total_of(values)


def task_mask(delta_N: Tensor, multitask_N: Tensor, scale: float) -> Tensor:
    """1 where ``|tau_k| > scale * |tau_M - tau_k|``, else 0."""
    rest_N = (multitask_N - delta_N).abs_()
    return torch.add(delta_N.abs(), rest_N, alpha=-scale).sign_().clamp_min_(0.0)
