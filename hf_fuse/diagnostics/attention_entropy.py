"""Entropy of attention: near 0 a head looks at one token, whatever the text, and training tends to become unstable.

B samples, H heads, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAPER = "https://arxiv.org/abs/2303.06296"
EPSILON = 1e-6


def attention_entropy(weights_BHTT: Tensor, attention_mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over queries of ``-sum p log(p + 1e-6)`` in nats, and of the share of the most there can be, ``(H,)`` each.

    The most is the log of the number of keys that a query can see: all, or those up to itself if nothing is ever seen
    beyond. (A sliding window sees fewer, so that its shares come out too small.) Queries with one key have no share.
    Without any query the entropy is 0.

    Args:
        weights_BHTT: of the softmax, queries before keys.
        attention_mask_BT: 0 for padding, whose queries and keys are left out.
    """
    p_BHTT = weights_BHTT.float()
    batch, _, queries, keys = p_BHTT.shape
    shown_BT = (
        torch.ones(batch, keys, dtype=torch.bool, device=p_BHTT.device)
        if attention_mask_BT is None
        else attention_mask_BT.bool()
    )
    causal = queries == keys and not p_BHTT.triu(1).any()
    visible_BQ = (shown_BT.cumsum(-1) if causal else shown_BT.sum(-1, keepdim=True).expand(-1, queries)).float()
    parts_BHTT = -p_BHTT * (p_BHTT + EPSILON).log()
    entropy_BHQ = parts_BHTT.masked_fill(~shown_BT[:, None, None], 0).sum(-1).clamp(min=0)
    asked_BQ = shown_BT[:, -queries:]
    entropy_H = _mean(entropy_BHQ, asked_BQ)
    share_BHQ = entropy_BHQ / visible_BQ.log().clamp(min=EPSILON)[:, None]
    return entropy_H, _mean(share_BHQ, asked_BQ & (visible_BQ > 1))


def _mean(values_BHQ: Tensor, kept_BQ: Tensor) -> Tensor:
    kept_BHQ = kept_BQ[:, None].expand_as(values_BHQ)
    return torch.where(kept_BHQ, values_BHQ, 0).sum((0, 2)) / kept_BQ.sum().clamp(min=1)
