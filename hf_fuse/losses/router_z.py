"""Router z-loss: keeps the router's logits small, so that rounding them matters less.

For every mixture of experts in half precision; beside ``load_balance``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.losses._tokens import flat, token_mean

PAPER = "https://arxiv.org/abs/2202.08906"


def router_z(router_logits: tuple[Tensor, ...], attention_mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of ``logsumexp(logits)^2``; usual weight 1e-3.

    Args:
        router_logits: per layer ``(N, E)`` or ``(B, S, E)``.
        attention_mask: ``(B, S)``, 0 for padding.
    """
    per_layer = [token_mean(flat(logits).logsumexp(-1).square(), attention_mask) for logits in router_logits]
    return torch.stack(per_layer).mean()
