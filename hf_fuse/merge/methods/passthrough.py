"""Copies one model, or layers of several into a taller one (a frankenmerge), optionally scaled."""

from __future__ import annotations

from torch import Tensor

from hf_fuse.registry import PerModel

PAPER = None  # a community practice (layer stacking)
MODELS = (1, 1)


def passthrough(models_KN: Tensor, *, scale: PerModel = 1.0) -> Tensor:
    """``scale * theta``; with ``scale`` 1 the result is the input, bit for bit.

    Args:
        models_KN: weights of one model, ``[1, N]``.
        scale: a factor, often given per tensor with filters (0 on ``o_proj`` and ``down_proj`` turns a stacked layer
            into the identity).
    """
    return models_KN[0] * scale[0]
