"""A frozen Linear with low-rank experts, each token mixing its own.

Everything is linear up to the sum, so E experts of rank r are one LoRA of rank E r whose rank-space activations are
multiplied with the routing weights: two matrix products whatever the routing, no gathering.
Axes: T tokens, i in, o out, E experts, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fuse.adapters.precise_linear import factor_dtype, no_autocast, precise_linear


def routed_linear(
    base_out_To: Tensor,
    x_Ti: Tensor,
    weights_TE: Tensor,
    A_Eri: Tensor,
    B_Eor: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """``base_out + scaling * sum_e weight_e B_e A_e dropout(x)``, in the dtype of ``base_out``.

    Args:
        base_out_To: the frozen Linear's output for ``x_Ti``, from the module itself, so that it may be quantised.
        x_Ti: its input.
        weights_TE: fp32, 0 where an expert is not chosen.
        A_Eri: down projections; ``(r, i)`` for one shared by all experts (HydraLoRA, arXiv 2404.19245).
        B_Eor: up projections.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        dropout: probability, 0 outside training; the mask is shared by the experts, so that they stay one product.
    """
    experts, _, rank = B_Eor.shape
    dtype = factor_dtype(base_out_To, A_Eri, B_Eor)
    x_Ti = F.dropout(x_Ti, dropout) if dropout else x_Ti
    with no_autocast(x_Ti):
        ranks_TEr = precise_linear(x_Ti, A_Eri.reshape(-1, A_Eri.shape[-1]), dtype).unflatten(-1, (-1, rank))
        weighted_Tn = (ranks_TEr * (weights_TE * scaling).unsqueeze(-1)).flatten(1).to(dtype)
        B_no = B_Eor.transpose(1, 2).reshape(experts * rank, -1).to(dtype)
        if base_out_To.dtype == dtype:  # adds while it multiplies
            return torch.addmm(base_out_To, weighted_Tn, B_no)
        return (base_out_To + weighted_Tn @ B_no).to(base_out_To.dtype)
