"""DoRA (arXiv 2402.09353): every output of ``W + s B A`` is rescaled to a learned magnitude.

Axes: i in, o out, E experts, r rank, T tokens.
"""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def row_norms(linear: nn.Module, A_Eri: Tensor, B_Eor: Tensor, scaling: float) -> Tensor:
    """``|row o of W + s B_e A_e|`` as (E, o), without making any of the E sums; no gradient, as in the paper."""
    with torch.no_grad():
        W_oi = transpose(dequantize_module_weight(linear), isinstance(linear, Conv1D))
        W_oi, A_Eri, B_Eor = W_oi.float(), A_Eri.float(), B_Eor.float()
        crossed_Eor = torch.einsum("oi,eri->eor", W_oi, A_Eri)
        gram_Err = A_Eri @ A_Eri.mT
        squares_Eo = W_oi.square().sum(1) + (B_Eor * (2 * scaling * crossed_Eor + scaling**2 * B_Eor @ gram_Err)).sum(
            -1
        )
        return squares_Eo.clamp(min=0).sqrt()


def rescaled(base_out_To: Tensor, delta_To: Tensor, linear: nn.Module, magnitude_o: Tensor, norms_o: Tensor) -> Tensor:
    """``m / |W + s B A| (W x + s B A x) + bias``, in the dtype of ``base_out``."""
    bias_o = getattr(linear, "bias", None)
    product_To = base_out_To if bias_o is None else base_out_To - bias_o
    scaled_To = (magnitude_o / norms_o) * (product_To + delta_To)
    return (scaled_To if bias_o is None else scaled_To + bias_o).to(base_out_To.dtype)
