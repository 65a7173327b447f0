"""DynMoLE's load balance: the weights that the experts got, not the number of tokens, so that both factors learn.

For routers whose number of experts per token varies; counts, as ``load_balance`` has them, say little there.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hf_fuse.losses._tokens import flat, token_mean
from hf_fuse.losses.load_balance import reduced_balance

PAPER = "https://arxiv.org/abs/2504.00661"
IN_BATCH = True


def soft_load_balance(
    router_logits: tuple[Tensor, ...],
    router_weights: tuple[Tensor, ...],
    attention_mask: Tensor | None = None,
    *,
    reduction: Literal["global", "per_layer", "sum"] = "global",
) -> Tensor:
    """``E * sum_e F_e P_e``: F_e the mean weight of expert e (its probability where chosen, else 0), P_e its mean
    probability. 1 when uniform over all experts, E at collapse. DynMoLE's weight is 1e-3.

    As both are means over the batch, the loss of a batch is not the mean of the losses of its parts.

    Args:
        router_logits: per layer ``(N, E)`` or ``(B, S, E)``.
        router_weights: per layer, of the same shape.
        attention_mask: ``(B, S)``, 0 for padding.
        reduction: as in :func:`~hf_fuse.losses.load_balance.load_balance`.
    """
    shares = [token_mean(flat(weights), attention_mask) for weights in router_weights]
    means = [token_mean(flat(logits).softmax(-1), attention_mask) for logits in router_logits]
    return reduced_balance(shares, means, reduction)
