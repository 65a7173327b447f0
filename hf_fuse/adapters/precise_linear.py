"""A matrix product in another precision than its input has, which keeps the input and not a converted copy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def precise_linear(x_Ti: Tensor, weight_oi: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight^T`` computed and returned in ``dtype``, also under autocast."""
    with no_autocast(x_Ti):
        weight_oi = weight_oi.to(dtype)
        if x_Ti.dtype == dtype or torch.compiler.is_compiling():  # a compiler finds out by itself
            return F.linear(x_Ti.to(dtype), weight_oi)
        return _PreciseLinear.apply(x_Ti, weight_oi)


def factor_dtype(base_out: Tensor, *factors: Tensor) -> torch.dtype:
    """The precision in which low-rank factors work next to a frozen module, as in PEFT: their own, or that of the
    module's output if it is higher; autocast's under autocast."""
    own, device = [factor.dtype for factor in factors], base_out.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        own = [torch.get_autocast_dtype(device)]
    return reduce(torch.promote_types, own, base_out.dtype)


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Switches autocast off on the tensor's device; the meta device knows none."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _PreciseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Ti: Tensor, weight_oi: Tensor) -> Tensor:
        ctx.save_for_backward(x_Ti, weight_oi)
        return F.linear(x_Ti.to(weight_oi.dtype), weight_oi)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_To: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_Ti, weight_oi = ctx.saved_tensors
        with no_autocast(d_To):
            d_x_Ti = (d_To @ weight_oi).to(x_Ti.dtype) if ctx.needs_input_grad[0] else None
            d_weight_oi = d_To.t() @ x_Ti.to(weight_oi.dtype) if ctx.needs_input_grad[1] else None
        return d_x_Ti, d_weight_oi
