"""Load balance of a mixture of experts: how many tokens each expert gets, times how likely the router finds it.

For every mixture of experts that is trained, against routers that send all tokens to a few experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.losses._tokens import flat, token_mean

PAPER = "https://arxiv.org/abs/2006.16668"
IN_BATCH = True


def load_balance(
    router_logits: tuple[Tensor, ...],
    attention_mask: Tensor | None = None,
    router_weights: tuple[Tensor, ...] | None = None,
    *,
    top_k: int = 2,
    reduction: Literal["global", "per_layer", "sum"] = "global",
    normalize_topk: bool = False,
) -> Tensor:
    """``E * sum_e f_e P_e`` (GShard): f_e the share of tokens that chose expert e, P_e its mean probability.

    The value is k wherever either factor is uniform, and E when all tokens go to the same experts with certainty and
    k = 1. Only P carries a gradient: f counts. As both are means over the batch, the loss of a batch is not the mean
    of the losses of its parts. Usual weight 1e-2 (1e-3 in Mixtral and MoE-PEFT).

    Args:
        router_logits: per layer ``(N, E)`` or ``(B, S, E)``.
        attention_mask: ``(B, S)``, 0 for padding.
        router_weights: what the routers chose (non-zero); None: the ``top_k`` largest logits.
        top_k: experts per token, if ``router_weights`` is None.
        reduction: ``global`` pools f and P over the layers first, as MixLoRA and transformers do: layers may make up
            for each other. ``per_layer`` is the mean of the layers' losses, ``sum`` (MoLA) their sum.
        normalize_topk: divide f by the mean number of experts per token: 1 when uniform, as MoLA.

    Raises:
        FuseError: ``global`` with layers of different numbers of experts.
    """
    shares, means = [], []
    for index, logits in enumerate(router_logits):
        logits_NE = flat(logits)
        if router_weights is None:
            kept_NK = logits_NE.detach().topk(min(top_k, logits_NE.shape[-1]), dim=-1).indices
            chosen_NE = torch.zeros_like(logits_NE).scatter_(-1, kept_NK, 1)
        else:
            chosen_NE = (flat(router_weights[index].detach()) != 0).to(logits_NE.dtype)
        shares.append(token_mean(chosen_NE, attention_mask))
        means.append(token_mean(logits_NE.softmax(-1), attention_mask))
    return reduced_balance(shares, means, reduction, normalize=normalize_topk)


def reduced_balance(shares: list[Tensor], means: list[Tensor], reduction: str, *, normalize: bool = False) -> Tensor:
    """``E * sum_e share_e mean_e`` per layer, combined over layers as ``reduction`` says."""
    if reduction == "global":
        if len({len(share_E) for share_E in shares}) > 1:
            raise FuseError(
                f"reduction: 'global' pools layers, but theirs have {[len(s) for s in shares]} experts. "
                "Use 'per_layer' or 'sum'."
            )
        shares, means = [torch.stack(shares).mean(0)], [torch.stack(means).mean(0)]
    if normalize:
        shares = [share_E / share_E.sum().clamp(min=1e-9) for share_E in shares]
    per_layer = torch.stack([len(share_E) * (share_E * mean_E).sum() for share_E, mean_E in zip(shares, means)])
    return per_layer.sum() if reduction == "sum" else per_layer.mean()
