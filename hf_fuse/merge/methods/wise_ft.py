"""WiSE-FT: interpolate between the base and one fine-tuned model for robustness."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2109.01903"
MODELS = (1, 1)


def wise_ft(deltas_KN: Tensor, *, alpha: Annotated[float, Between(0, 1)] = 0.5) -> Tensor:
    """``(1 - alpha) theta_0 + alpha theta_1``.

    Args:
        deltas_KN: theta_1 - theta_0 of the one model, ``[1, N]``.
        alpha: 0 is the base, 1 the fine-tuned model. 0.5 is the usual choice without validation data; that it is the
            authors' default is unverified.
    """
    return deltas_KN[0] * alpha
