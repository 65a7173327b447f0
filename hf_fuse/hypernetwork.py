"""Weights that a small network makes from numbers such as merge coefficients, with inputs of constant size (MIP).

For one model over a range of trade-offs: a Pareto front, or coefficients that a user turns. arXiv 2304.07645
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call


def magnitude_invariant(values_M: Tensor) -> Tensor:
    """``[cos(pi g / 2), sin(pi g / 2)]``, ``(..., 2 M)`` of numbers g from 0 to 1, whose squares sum to M.

    With the numbers themselves as input, made weights would grow with them, and so would gradients.
    """
    angle_M = values_M * (math.pi / 2)
    return torch.cat([angle_M.cos(), angle_M.sin()], dim=-1)


class HyperNetwork(nn.Module):
    """Makes the trained parameters of a model: ``theta_0 + h(E(g))``, theta_0 learned too, E being
    :func:`magnitude_invariant`.

    At the start, h is 0 and the model what it was.

    ::

        hyper = HyperNetwork(head, inputs=1)
        logits = hyper(torch.tensor([0.3]), features)

    Args:
        model: whose trained parameters become theta_0; it is called with others.
        inputs: how many numbers g are.
        hidden: units of the layer of h.
    """

    def __init__(self, model: nn.Module, *, inputs: int, hidden: int = 64) -> None:
        super().__init__()
        self.model = model
        self._shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        size = sum(shape.numel() for shape in self._shapes.values())
        self.h = nn.Sequential(nn.Linear(2 * inputs, hidden), nn.ReLU(), nn.Linear(hidden, size))
        nn.init.zeros_(self.h[-1].weight)
        nn.init.zeros_(self.h[-1].bias)

    def parameters_at(self, values_M: Tensor) -> dict[str, Tensor]:
        """The parameters for numbers g ``(M,)``, by name."""
        parts = self.h(magnitude_invariant(values_M)).split([shape.numel() for shape in self._shapes.values()])
        own = dict(self.model.named_parameters())
        return {
            name: own[name] + part.view(shape).to(own[name]) for (name, shape), part in zip(self._shapes.items(), parts)
        }

    def forward(self, values_M: Tensor, *args, **kwargs):
        """What the model gives with these parameters."""
        return functional_call(self.model, self.parameters_at(values_M), args, kwargs)
