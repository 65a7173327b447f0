"""How undecided the router is: the mean entropy of its choice, scaled to [0, 1]; DynMoLE lowers it in training.

For routers that choose experts by probability mass (top-p), which stay dense if they are undecided.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.losses._tokens import flat, token_mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2504.00661"


def router_entropy(
    router_logits: tuple[Tensor, ...],
    attention_mask: Tensor | None = None,
    *,
    entropy: Literal["tsallis", "renyi"] = "tsallis",
    entropy_index: Annotated[float, Between(0, open_low=True)] = 1.1,
) -> Tensor:
    """Mean over layers and tokens of :func:`normalized_entropy`. DynMoLE adds 0.01 times it, with index 1.1.

    Args:
        router_logits: per layer ``(N, E)`` or ``(B, S, E)``; E may differ between layers.
        attention_mask: ``(B, S)``, 0 for padding. (DynMoLE's code counts padding in this term.)
        entropy: which generalisation of Shannon's entropy.
        entropy_index: its index q; 1 is Shannon's entropy for both.
    """
    per_layer = [
        token_mean(normalized_entropy(flat(logits).log_softmax(-1), entropy_index, entropy), attention_mask)
        for logits in router_logits
    ]
    return torch.stack(per_layer).mean()


def normalized_entropy(
    log_probabilities_TE: Tensor, entropy_index: float, entropy: Literal["tsallis", "renyi"] = "tsallis"
) -> Tensor:
    """Entropy of each row divided by that of the uniform distribution: 1 if uniform, 0 if one-hot or E = 1.

    Tsallis: ``(1 - sum p^q) / (q - 1)``, the Gini impurity at q = 2. Renyi: ``log(sum p^q) / (1 - q)``.
    """
    q, experts = entropy_index, log_probabilities_TE.shape[-1]
    if experts == 1:
        return (log_probabilities_TE * 0).sum(-1)
    # log 0 = -inf would make 0 * inf; below e^-80 a probability adds nothing.
    log_p_TE = log_probabilities_TE.clamp(min=-80)
    p_TE = log_p_TE.exp()
    if abs(q - 1) < 1e-6:
        return -(p_TE * log_p_TE).sum(-1) / math.log(experts)
    # 1 - sum p^q = -sum p (p^(q-1) - 1): expm1 keeps the digits that the difference loses as q -> 1.
    lack_T = -(p_TE * torch.expm1((q - 1) * log_p_TE)).sum(-1)
    if entropy == "renyi":
        return torch.log1p(-lack_T) / ((1 - q) * math.log(experts))
    return lack_T / -math.expm1((1 - q) * math.log(experts))
