"""RAM: average what several models changed, keep in full what only one did."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.merge.methods._overlap import combine_by_overlap
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2601.13572"
SCALARS = "mean"


def ram(deltas_KN: Tensor, *, epsilon: Annotated[float, Between(0)] = 1e-5) -> Tensor:
    """``theta_0 + sum_k active_k tau_k / max(1, sum_k active_k)`` with ``active_k = |tau_k| > epsilon``.

    Args:
        deltas_KN: task vectors, N elements.
        epsilon: what counts as unchanged, in the unit of the weights. 1e-5 suits models trained by reinforcement, which
            change few weights; 0 asks for any change at all.
    """
    return combine_by_overlap(deltas_KN, epsilon)
