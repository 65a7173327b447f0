"""Means over the predictions of a batch."""

from __future__ import annotations

from torch import Tensor


def mean(values_N: Tensor) -> Tensor:
    """The mean; of nothing 0, tied to the graph."""
    return values_N.sum() / max(values_N.numel(), 1)
