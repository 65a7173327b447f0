"""Linear layers with weights of one bit and a scale, trained through ReSTE's estimate of the sign's gradient.

For research on binarised models: training starts as with the identity in place of the sign's gradient, and ends near
the sign's own. arXiv 2308.06689
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback

from hf_fuse.errors import FuseError

NEAR, FAR = 0.1, 1.5


class _Reste(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, exponent: Tensor, far: float) -> Tensor:
        ctx.save_for_backward(values, exponent.clone())
        ctx.far = far
        return torch.where(values < 0, -1.0, 1.0).to(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        values, exponent = ctx.saved_tensors
        size = values.float().abs()
        slope = size.clamp(min=NEAR) ** (1 / exponent - 1) / exponent
        # At 0 the power function has no slope: that of its chord.
        slope = torch.where(size > NEAR, slope, NEAR ** (1 / exponent) / NEAR)
        return gradient * torch.where(size <= ctx.far, slope, 0).to(gradient), None, None


def reste(values: Tensor, exponent: float | Tensor, *, far: float = FAR) -> Tensor:
    """The sign (1 of 0), with the gradient of ``sign(x) |x|^(1 / o)`` up to ``far`` and 0 beyond.

    Args:
        values: of any shape.
        exponent: o, 1 or more; 1 is the identity.
        far: values beyond have no gradient.
    """
    return _Reste.apply(values, torch.as_tensor(exponent, dtype=torch.float32, device=values.device), far)


def reste_exponent(progress: float, *, last: float = 3.0) -> float:
    """o at a share of the training from 0 to 1: half a cosine from 1 to ``last``."""
    return 1 + (1 - math.cos(math.pi * progress)) / 2 * (last - 1)


class BinaryWeight(nn.Module):
    """``mean|W| * sign(W)``."""

    exponent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("exponent", torch.tensor(1.0))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs().mean() * reste(weight, self.exponent)


class ReSTECallback(TrainerCallback):
    """Raises the exponent of all binary weights during the training.

    Args:
        last: exponent.
    """

    def __init__(self, last: float = 3.0) -> None:
        self.last = last

    def on_step_begin(self, args, state, control, model: nn.Module, **kwargs) -> None:
        exponent = reste_exponent(state.global_step / max(state.max_steps, 1), last=self.last)
        for module in model.modules():
            if isinstance(module, BinaryWeight):
                module.exponent.fill_(exponent)


def binarise(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Gives linear layers binary weights in place; train then with :class:`ReSTECallback`.

    Args:
        model: without adapters.
        targets: last parts of the names of layers (``up_proj``).

    Returns:
        The names of the layers.

    Raises:
        FuseError: no such layers, or they are binary already.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[-1] in targets
    }
    if not found:
        raise FuseError(f"binarise: no linear layer of {type(model).__name__} is called {', '.join(targets)}.")
    for name, module in found.items():
        if parametrize.is_parametrized(module, "weight"):
            raise FuseError(f"binarise: {name} is parametrised already.")
        parametrize.register_parametrization(module, "weight", BinaryWeight())
    return list(found)


def fold_binary(model: nn.Module) -> list[str]:
    """Leaves the binary weights as plain ones, in place: a stock model again. Returns the names of the layers."""
    names = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(
            module.parametrizations["weight"][0], BinaryWeight
        ):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            names.append(name)
    return names
