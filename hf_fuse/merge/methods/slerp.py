"""SLERP: spherical interpolation between two models, each tensor taken as one vector."""

from __future__ import annotations

import math

from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement
from hf_fuse.merge.methods._products import gram

PAPER = "https://dl.acm.org/doi/10.1145/325165.325242"
MODELS = (2, 2)
SCALARS = "mean"
MEASURE_SCOPE = "tensor"


def measure(count: int, numel: int, dtype: object) -> Measurement:
    return (yield from gram(count))


def slerp(models_KN: Tensor, *, t: float = 0.5, threshold: float = 0.9995, state: Tensor) -> Tensor:
    """``[sin((1-t) a) v_0 + sin(t a) v_1] / sin a`` with ``a`` the angle between the two tensors.

    Args:
        models_KN: weights of the two models, ``[2, N]``; with a base in the recipe the base is v_0.
        t: 0 is the first model, 1 the second; beyond, the arc goes on.
        threshold: from this |cosine| on, linear interpolation. Ordinary fine-tunes of one base are that close.
        state: 2x2 inner products of the whole tensor.

    Reference: K. Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985.
    """
    first, second = arc_weights(state, t, threshold)
    return (models_KN[0] * first).add_(models_KN[1], alpha=second)


def arc_weights(products: Tensor, t: float, threshold: float) -> tuple[float, float]:
    """Factors of the two vectors for arc position ``t``, from their inner products."""
    norms = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
    # A zero vector has no direction; the reference counts it as perpendicular.
    cosine = max(-1.0, min(1.0, float(products[0, 1]) / norms)) if norms else 0.0
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if abs(cosine) > threshold or sine < 1e-8:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
