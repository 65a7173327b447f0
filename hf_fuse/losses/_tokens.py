"""Tokens that count: flattened, and weighed by the attention mask."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.errors import FuseError


def flat(values: Tensor) -> Tensor:
    """``(B, S, E)`` or ``(N, E)`` to ``(N, E)`` in fp32 (fp64 stays)."""
    return values.flatten(0, -2).to(torch.promote_types(values.dtype, torch.float32))


def token_mean(values_N: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean of ``values_N`` (``(N,)`` or ``(N, E)``) over the tokens that are not padding; 0 if there are none.

    Raises:
        FuseError: the mask has another number of tokens.
    """
    count = values_N.shape[0]
    if attention_mask is None:
        return values_N.sum(0) / max(count, 1)
    if attention_mask.numel() != count:
        raise FuseError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, {attention_mask.numel()} tokens, but the router "
            f"saw {count}. Pass the mask of those tokens, or None to count all of them."
        )
    kept_N = attention_mask.reshape(-1).to(values_N)
    # where() and not a product: padding may hold infinities.
    kept = torch.where(kept_N.bool().view(-1, *[1] * (values_N.dim() - 1)), values_N, 0)
    return kept.sum(0) / kept_N.bool().sum().clamp(min=1)
