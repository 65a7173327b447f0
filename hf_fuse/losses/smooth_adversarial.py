"""Smooth adversarial comp-sum loss: right with a margin, and steady in a small ball around each input.

For classifiers that must withstand small changes of pixels or word embeddings. Each of its ``steps`` costs a forward
and a backward pass, and one more forward pass is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_fuse.input_points import Move
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.losses.comp_sum import comp_sum
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2304.07288"


def smooth_adversarial(
    logits_NC: Tensor,
    labels_N: Tensor,
    logits_at: Callable[[Move], Tensor],
    *,
    tau: Annotated[float, Between(0, 2)] = 1.0,
    rho: Annotated[float, Between(0, open_low=True)] = 1.0,
    nu: Annotated[float, Between(0)] = 1.0,
    radius: Annotated[float, Between(0, open_low=True)] = 0.03,
    steps: Annotated[int, Between(1)] = 3,
) -> Tensor:
    """``comp_sum(logits / rho) + nu * mean of the largest ||D(x', y) - D(x, y)||``, D the margins ``s_y - s_j``.

    x' is found in a ball of ``radius`` around x (Euclidean, over all numbers of a sample): first along the gradient of
    the cross-entropy, then by projected ascent on the distance itself, which has no slope at x. The values of rho and
    nu are recalled from the paper and not verified. Set the weight of ``task`` to 0.

    Args:
        logits_NC: of x, of the samples that have a label.
        labels_N: class indices.
        logits_at: logits from moved pixels or word embeddings.
        tau: which comp-sum loss.
        rho: divides the margins.
        nu: weight of steadiness.
        radius: of the ball.
        steps: of the search.
    """
    labels_N = class_indices(labels_N)
    margins_NC = _margins(logits_NC, labels_N)
    moved: Tensor | None = None
    for step in range(steps):
        delta = None if moved is None else moved.detach().requires_grad_()
        points: list[Tensor] = []

        def move(x: Tensor, delta: Tensor | None = delta, points: list[Tensor] = points) -> Tensor:
            points.append(torch.zeros_like(x, requires_grad=True) if delta is None else delta)
            return x.detach() + points[0]

        with torch.enable_grad():
            there_NC = logits_at(move)
            if step == 0:
                worth = cross_entropy(there_NC.float(), labels_N, reduction="sum")
            else:
                worth = (_margins(there_NC, labels_N) - margins_NC.detach()).square().sum()
            (slope,) = torch.autograd.grad(worth, points[0])
        moved = _into_ball(points[0].detach() + _into_ball(slope, radius, fill=True), radius)
    distances_N = torch.linalg.vector_norm(_margins(logits_at(lambda x: x + moved), labels_N) - margins_NC, dim=-1)
    return comp_sum(logits_NC / rho, labels_N, tau=tau) + nu * mean(distances_N)


def _margins(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    logits_NC = logits_NC.float()
    return logits_NC.gather(-1, labels_N.unsqueeze(-1)) - logits_NC


def _into_ball(moves: Tensor, radius: float, *, fill: bool = False) -> Tensor:
    """Each sample's move, shortened to ``radius`` if it is longer; with ``fill`` all are as long."""
    lengths_B = torch.linalg.vector_norm(moves.flatten(1), dim=-1).view(-1, *[1] * (moves.dim() - 1))
    factors = radius / lengths_B.clamp(min=1e-12)
    return moves * (factors if fill else factors.clamp(max=1))
