"""Gradients of a part of a model, multiplied: to balance two modalities of which one learns faster than the other.

What is multiplied is a tensor (:func:`scale_gradient`) or a layer's parameters (:class:`GradientScale`); by how much
says any number, such as :func:`agm_factors` (arXiv 2308.07686) or :func:`iemf_factor` (arXiv 2505.10176).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """``values``, whose gradient is multiplied by ``factor``."""
    return _Scaled.apply(values, factor)


class GradientScale:
    """Multiplies the gradients of a layer's parameters by :attr:`factor`, which may change at any time.

    ::

        scale = GradientScale(model.fusion)
        scale.factor = iemf_factor(first_logits, second_logits, logits, labels)  # before each backward pass

    Args:
        module: whose parameters.
        factor: at the start.
    """

    def __init__(self, module: nn.Module, factor: float = 1.0) -> None:
        self.factor = factor
        self._hooks = [
            parameter.register_hook(lambda gradient: gradient * self.factor)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def remove(self) -> None:
        """Gradients are what they are again."""
        for hook in self._hooks:
            hook.remove()


def contributions(both: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of two modalities in the logits, their Shapley values, which add up to ``both``.

    Args:
        both: logits.
        first: logits from the first modality, with zeros for the second.
        second: the other way round.
    """
    return (both - second + first) / 2, (both - first + second) / 2


def agm_factors(
    losses: tuple[float, float], mean_losses: tuple[float, float], *, alpha: float = 0.5
) -> tuple[float, float]:
    """Factors ``e^(alpha (tau - r))`` for the gradients of the two :func:`contributions` (AGM).

    ``r = e^(loss of the other - loss)`` tells how far ahead a modality is, tau the same from ``mean_losses``.

    Args:
        losses: mean cross-entropy of each contribution in this batch.
        mean_losses: their running means.
        alpha: strength; the reference takes other values for other data.
    """
    ahead, usual = (math.exp(second - first) for first, second in (losses, mean_losses))
    return math.exp(alpha * (usual - ahead)), math.exp(alpha * (1 / usual - 1 / ahead))


@torch.no_grad()
def iemf_factor(first_logits_NC: Tensor, second_logits_NC: Tensor, logits_NC: Tensor, labels_N: Tensor) -> float:
    """``1 + tanh 1 - tanh((S_1 + S_2) / S)``, for the gradients of the fusing layer; S are sums of the labels'
    probabilities.

    Below 1 while both modalities alone know more than the fused model (IEMF).

    Args:
        first_logits_NC: of the first modality alone.
        second_logits_NC: of the second.
        logits_NC: of both.
        labels_N: class indices.
    """
    known = [
        logits.float().softmax(-1).gather(-1, labels_N[:, None]).sum().item()
        for logits in (first_logits_NC, second_logits_NC, logits_NC)
    ]
    return inverse_effectiveness(*known)


def inverse_effectiveness(first: float, second: float, both: float) -> float:
    """IEMF's factor of three sums of probabilities."""
    return 1 + math.tanh(1) - math.tanh((first + second) / max(both, 1e-12))
