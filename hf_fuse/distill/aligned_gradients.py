"""Gradients of an auxiliary loss without the part that points against the main loss's (DHKD's gradient alignment)."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class AlignedGradients:
    """Keeps what an auxiliary loss does to the parameters apart, until the gradients of a whole batch are there.

    Args:
        model: whose trainable parameters the two losses may share.
        accelerator: knows the other processes.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        self._sums: dict[nn.Parameter, Tensor] = {}

    def apart(self, hidden: Tensor) -> Tensor:
        """``hidden``, through which the gradient goes no further: it is collected for :meth:`add` instead."""
        return _Apart.apply(hidden, self)

    def collect(self, hidden: Tensor, gradient: Tensor) -> None:
        """What ``gradient`` at ``hidden`` means for the parameters, by a backward pass of its own."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(hidden, parameters, gradient, retain_graph=True, allow_unused=True)
        for parameter, value in zip(parameters, found):
            if value is not None:
                known = self._sums.get(parameter)
                self._sums[parameter] = value if known is None else known + value

    def add(self) -> None:
        """Adds the collected gradients to those of the parameters: ``g_aux - min(0, <g_aux, g>) / |g|^2 g``."""
        shared = [(parameter, value) for parameter, value in self._sums.items() if parameter.grad is not None]
        self._sums = {}
        if not shared:
            return
        if self.accelerator.num_processes > 1:
            shared = [(parameter, self.accelerator.reduce(value, "mean")) for parameter, value in shared]
        products = [(value.float() * parameter.grad.float()).sum() for parameter, value in shared]
        squares = [parameter.grad.float().square().sum() for parameter, _ in shared]
        product, square = torch.stack(products).sum(), torch.stack(squares).sum()
        against = product.clamp(max=0) / square.clamp(min=torch.finfo(torch.float32).tiny)
        for parameter, value in shared:
            parameter.grad.add_(value - against.to(value.dtype) * parameter.grad)


class _Apart(torch.autograd.Function):
    # The backbone's own backward pass waits for this one's: what it has saved is still there.
    @staticmethod
    def forward(context: Any, hidden: Tensor, gradients: AlignedGradients) -> Tensor:
        context.hidden, context.gradients = hidden, gradients
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None]:
        with torch.enable_grad():
            context.gradients.collect(context.hidden, gradient)
        context.hidden = None
        return None, None
