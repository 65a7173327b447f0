"""NearSwap: take over another model where it is near the base, and no more than a given step where it is not."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.registry import Between

PAPER = None  # a community method, known from a model card
MODELS = (1, 1)


def nearswap(deltas_KN: Tensor, *, t: Annotated[float, Between(0)] = 1e-4) -> Tensor:
    """``theta_0 + clamp(tau, -t, t)``: interpolation with weight ``min(1, t / |tau|)`` per element.

    Args:
        deltas_KN: the task vector of the one model, ``[1, N]``.
        t: the largest step, in the unit of the weights. 0.0001 in the model that the name comes from.
    """
    return deltas_KN[0].clamp(-t, t)
